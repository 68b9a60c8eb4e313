"""KT-Kernel's methods over the checkpoints they are for: the numbers of the file, also when nothing
of it is left.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import ktk
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.reference.moe import oracle_forward
from make.native_checkpoints import EXPERTS, HIDDEN, INTERMEDIATE, directory

# Method -> the checkpoint, and the largest error: of fp32 sums, of activations of 15 or of 8 bits.
METHODS = {
    "FP8": ("fp8 blocks", 1e-5),
    "FP8_PERCHANNEL": ("fp8 channel", 1e-5),
    "RAWINT4": ("int4", 0.02),
    "MXFP4": ("mxfp4", 3e-4),
    "MXFP8": ("mxfp8", 1e-5),
    "NVFP4": ("nvfp4 packed", 3e-4),
    "INT4_ASYM": ("awq", 3e-4),
    "auto": ("nvfp4 modelopt", 3e-4),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_the_files_numbers_after_the_file_is_gone(
    method: str, tmp_path: Path
) -> None:
    kind, bound = METHODS[method]
    weights = directory(tmp_path / "in", kind)
    wrapper = ktk.KTMoEWrapper(
        0,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        method=method,
        weight_path=str(tmp_path / "in"),
    )
    wrapper.load_weights()
    shutil.rmtree(tmp_path / "in")
    gc.collect()
    noise = [np.full((1 << 16,), 255, np.uint8) for _ in range(64)]  # where freed memory was
    stem = "model.layers.0.mlp.experts"
    experts = [
        ExpertWeights(*(weights[f"{stem}.{e}.{part}_proj"] for part in ("gate", "up", "down")))
        for e in range(EXPERTS)
    ]
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((5, HIDDEN)) * 1e-3).astype(np.float32)
    ids, by = np.array([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), np.full((5, 2), 0.5, np.float32)
    want = oracle_forward(experts, MoESpec(EXPERTS, HIDDEN, INTERMEDIATE), x, ids, by)
    got = wrapper.forward(*(torch.from_numpy(a) for a in (x, ids, by))).numpy()
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)
    assert len(noise) == 64
