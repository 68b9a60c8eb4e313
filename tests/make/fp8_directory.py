"""A bf16 directory made fp8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5")

import torch

from ktk.checkpoint import Checkpoint
from ktk.experts.formats.floats import bf16_to_f32
from make.checkpoints import write_safetensors

SEED = 11


def to_fp8(path: Path) -> None:
    """Make the linear layers of a bf16 directory, a matrix each, fp8 with 128x128 blocks."""
    tensors: dict[str, Any] = {}
    rng = np.random.default_rng(SEED)
    with Checkpoint.open(path) as plain:
        for name in plain.tensors:
            values = plain.read(name)
            if not name.endswith("_proj.weight"):
                tensors[name] = values
                continue
            assert values.ndim == 2
            blocks = [-(-n // 128) for n in values.shape]
            scale = rng.uniform(0.5, 2, blocks).astype(np.float32)
            spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[
                : values.shape[0], : values.shape[1]
            ]
            codes = torch.from_numpy(bf16_to_f32(values) / spread).to(torch.float8_e4m3fn)
            tensors[name] = ("F8_E4M3", codes.view(torch.uint8).numpy())
            tensors[f"{name}_scale_inv"] = scale
    write_safetensors(path / "model.safetensors", tensors)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
