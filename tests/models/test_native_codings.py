"""Checkpoints in the precisions that people publish: the format of panels that keeps their codes is
found, and panels hold what the files' definition says, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ktk.checkpoint import Checkpoint, read_layer
from ktk.convert import convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import f32_to_bf16
from ktk.models import find_experts
from make.cases import assert_exact
from make.native_checkpoints import ATTENTION, EXPERTS, KINDS, directory

F = np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_panels_hold_what_the_file_says(kind: str, tmp_path: Path) -> None:
    weights = directory(tmp_path / "in", kind)
    name, group = KINDS[kind][2]
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        experts = find_experts(checkpoint)
        assert experts.panel_format == (name, group)
        read = experts.read(0, 1)
    convert(tmp_path / "in", tmp_path / "out", quant_method=name)
    packed = read_layer(tmp_path / "out", 0)
    assert (packed.spec.weight_format, packed.spec.group_size) == (name, group)
    for expert in range(EXPERTS):
        got = expert_weights(packed, expert)
        for part in ("gate", "up", "down"):
            want = weights[f"model.layers.0.mlp.experts.{expert}.{part}_proj"]
            assert_exact(want, getattr(got, part))
            if expert == 1:
                assert_exact(want, np.ascontiguousarray(getattr(read, part)))
    with Checkpoint.open(tmp_path / "out") as out:  # other modules become bf16
        assert_exact(f32_to_bf16(weights[ATTENTION]), out.read(f"{ATTENTION}.weight"))
        assert not [n for n in out.tensors if n.startswith(ATTENTION) and not n.endswith("weight")]


SCALES = {
    "nvfp4 packed": ("weight_scale", "F8_E4M3", 0x7F),
    "nvfp4 modelopt": ("weight_scale_2", "F32", np.nan),
    "awq": ("scales", "F16", np.inf),
    "fp8 channel": ("weight_scale", "F32", np.nan),
    "mxfp8": ("weight_scale_inv", "U8", 255),
    "mxfp4": ("scale", "U8", 255),
}


@pytest.mark.parametrize("kind", SCALES)
def test_missing_and_broken_scales_are_refused(kind: str, tmp_path: Path) -> None:
    """e8m0 of 255 and e4m3 of 127 are NaN."""
    suffix, dtype, value = SCALES[kind]
    source = tmp_path / "in"
    directory(source, kind)
    name = f"model.layers.0.mlp.experts.1.up_proj.{suffix}"
    with Checkpoint.open(source) as checkpoint:
        info = checkpoint.info(name)
    path = source / "model.safetensors"
    whole = bytearray(path.read_bytes())
    bits = {"F8_E4M3": np.uint8, "U8": np.uint8, "F16": np.float16, "F32": F}[dtype](value)
    whole[info.begin : info.begin + bits.nbytes] = bits.tobytes()
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"up_proj.{suffix}.*NaN"):
        convert(source, tmp_path / "out", quant_method=KINDS[kind][2][0])
    header = whole.replace(f'up_proj.{suffix}"'.encode(), f'up_proj.{suffix[:-1]}_"'.encode())
    path.write_bytes(header)
    with pytest.raises(CheckpointError, match="scale|does not know what this is|without a scale"):
        convert(source, tmp_path / "out", quant_method="int8")


def test_awq_of_another_version_is_refused(tmp_path: Path) -> None:
    directory(tmp_path, "awq", version="gemv")
    with (
        pytest.raises(CheckpointError, match="AWQ's version 'gemv'"),
        Checkpoint.open(tmp_path) as c,
    ):
        find_experts(c)
