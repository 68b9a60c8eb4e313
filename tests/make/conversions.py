"""Conversions for tests: what they write, and what they should have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ktk.checkpoint import Checkpoint
from ktk.experts.spec import MoESpec
from ktk.models import find_experts
from ktk.quantise.pack import pack_expert
from make import gguf_files
from make.command_line import Done
from make.forked import ktk


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def packed_by_hand(source: Path, layer: int, **options: Any) -> np.ndarray:
    """What ``pack_expert`` makes of each expert, without convert."""
    experts = find_experts(Checkpoint.open(source))
    spec = MoESpec(**experts.spec_fields(layer), **options)
    out = np.empty((spec.num_experts, spec.layout.expert_bytes), np.uint8)
    for expert in range(spec.num_experts):
        pack_expert(spec, experts.read(layer, expert), out[expert])
    return out


def run_convert(*arguments: object) -> Done:
    return ktk("convert", *arguments)


def tiny_gguf(path: Path, **more: Any) -> Path:
    """Layers 0 and 2 in different types, with routing metadata."""
    rng = np.random.default_rng(1)
    tensors = gguf_files.stacked(rng, (0, 2)) | gguf_files.stacked(
        rng, (2,), ("down",), gguf.GGMLQuantizationType.Q4_0
    )
    metadata = gguf_files.sizes("qwen3moe", expert_weights_norm=True, **more)
    return gguf_files.write_gguf(path, "qwen3moe", tensors, metadata)
