"""Checkpoints in the precisions that people publish: the format of panels that keeps their codes is
found, and panels hold what the files' definition says, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktk.checkpoint import Checkpoint, read_layer
from ktk.convert import convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import f32_to_bf16
from ktk.models import find_experts
from make.cases import assert_exact
from make.checkpoints import base_config, write_directory

HIDDEN, INTERMEDIATE, EXPERTS = 128, 256, 2
F = np.float32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F)
Made = tuple[dict[str, Any], np.ndarray]  # a module's tensors by suffix, and its weights


def e4m3(codes: np.ndarray) -> np.ndarray:
    """By the definition: 4 exponent bits, bias 7."""
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(int) - 7)
    value = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    return np.where(codes & 128, -value, value).astype(F)


def small_floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where((codes & 127) == 127, 5, codes).astype(np.uint8)


def fp4(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Two codes a byte, the even column low, and their values."""
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, E2M1[codes]


def words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Codes (rows, columns) to int32 (rows, columns / 8); nibble i is column order[i]'s."""
    found = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate(order):
        found |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return found.view(np.int32)


def spread(scales: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(scales, group, axis=1)


def nvfp4(rng: np.random.Generator, rows: int, columns: int, is_packed: bool) -> Made:
    packed, values = fp4(rng, rows, columns)
    scales = small_floats(rng, (rows, columns // 16)) & 127
    scales = np.where(scales == 127, 9, scales).astype(np.uint8)
    of_matrix = F(rng.uniform(200, 900)) if is_packed else F(rng.uniform(1e-4, 1e-3))
    by = F(1) / of_matrix if is_packed else of_matrix
    tensors: dict[str, Any] = {"weight_scale": ("F8_E4M3", scales)}
    if is_packed:
        tensors |= {"weight_packed": packed, "weight_global_scale": np.array([of_matrix])}
        tensors["input_global_scale"] = np.array([F(1)])
    else:
        tensors |= {"weight": packed, "weight_scale_2": np.array(of_matrix)}
        tensors["input_scale"] = np.array(F(1))
    return tensors, values * spread(e4m3(scales) * by, 16)


def int4_asym(
    rng: np.random.Generator, rows: int, columns: int, kind: str, group: int = 64
) -> Made:
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    zeros = rng.integers(1, 16, (rows, columns // group), dtype=np.uint8)
    scales = rng.uniform(1e-3, 1e-2, zeros.shape).astype(np.float16)
    if kind == "compressed":
        scales = (np.floor(scales * 2.0**12) / 2.0**12).astype(np.float16)  # bf16 holds them, too
    weights = (codes.astype(F) - spread(zeros, group).astype(F)) * spread(scales.astype(F), group)
    if kind == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": ("I32", words(np.ascontiguousarray(codes.T), order)),
            "qzeros": ("I32", words(np.ascontiguousarray(zeros.T), order)),
            "scales": np.ascontiguousarray(scales.T),
        }, weights
    if kind == "gptq":
        return {
            "qweight": ("I32", np.ascontiguousarray(words(codes).T)),
            "qzeros": ("I32", words(np.ascontiguousarray(zeros.T - 1))),
            "scales": np.ascontiguousarray(scales.T),
        }, weights
    return {
        "weight_packed": ("I32", words(codes)),
        "weight_scale": f32_to_bf16(scales.astype(F)),
        "weight_shape": np.array(codes.shape, np.int64),
        "weight_zero_point": (
            "I32",
            np.ascontiguousarray(words(np.ascontiguousarray(zeros.T)).T),
        ),
    }, weights


def fp8_channel(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, scales = small_floats(rng, (rows, columns)), rng.uniform(1e-4, 1e-2, (rows, 1))
    tensors = {"weight": ("F8_E4M3", codes), "weight_scale": scales.astype(F)}
    return tensors, e4m3(codes) * scales.astype(F)


def fp8_tensor(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, scale = small_floats(rng, (rows, columns)), F(rng.uniform(1e-4, 1e-2))
    tensors = {"weight": ("F8_E4M3", codes), "weight_scale": np.array([scale])}
    return tensors, e4m3(codes) * scale


def fp8_e5m2(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 0x7C) == 0x7C] = 0
    values = (codes.astype(np.uint16) << 8).view(np.float16).astype(F)  # fp16's upper half
    scales = rng.uniform(1e-4, 1e-2, (rows, 1)).astype(F)
    return {"weight": ("F8_E5M2", codes), "weight_scale": scales}, values * scales


def mxfp8(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes = small_floats(rng, (rows, columns))
    powers = rng.integers(110, 126, (rows, columns // 32), dtype=np.uint8)
    scales = np.ldexp(F(1), powers.astype(int) - 127).astype(F)
    tensors = {"weight": ("F8_E4M3", codes), "weight_scale_inv": powers}
    return tensors, e4m3(codes) * spread(scales, 32)


def mxfp4(rng: np.random.Generator, rows: int, columns: int) -> Made:
    packed, values = fp4(rng, rows, columns)
    powers = rng.integers(110, 126, (rows, columns // 32), dtype=np.uint8)
    scales = np.ldexp(F(1), powers.astype(int) - 127).astype(F)
    return {"weight": packed, "scale": powers}, values * spread(scales, 32)


# What it is called -> how a module is made, its quantization_config, and the panels that keep it.
KINDS: dict[str, tuple[Callable[..., Made], dict[str, Any], tuple[str, int]]] = {
    "nvfp4 packed": (
        lambda *a: nvfp4(*a, True),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        ("nvfp4", 16),
    ),
    "nvfp4 modelopt": (
        lambda *a: nvfp4(*a, False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ("nvfp4", 16),
    ),
    "awq": (
        lambda *a: int4_asym(*a, "awq"),
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        ("int4_asym", 64),
    ),
    "gptq": (
        lambda *a: int4_asym(*a, "gptq", 32),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
        ("int4_asym", 32),
    ),
    "compressed": (
        lambda *a: int4_asym(*a, "compressed", 128),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ("int4_asym", 128),
    ),
    "fp8 channel": (fp8_channel, {"quant_method": "compressed-tensors"}, ("fp8_channel", 0)),
    "fp8 tensor": (fp8_tensor, {"quant_method": "modelopt"}, ("fp8_channel", 0)),
    "fp8 e5m2": (fp8_e5m2, {"quant_method": "fp8"}, ("fp8_e5m2", 0)),
    "mxfp8": (mxfp8, {"quant_method": "mxfp8"}, ("mxfp8", 32)),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}, ("mxfp4", 32)),
}


def directory(path: Path, kind: str) -> dict[str, np.ndarray]:
    """A checkpoint of one layer of such experts; weights by module."""
    make, said, _ = KINDS[kind]
    rng, tensors, weights = np.random.default_rng(7), {}, {}
    for expert, part in itertools.product(range(EXPERTS), ("gate", "up", "down")):
        rows, columns = (HIDDEN, INTERMEDIATE) if part == "down" else (INTERMEDIATE, HIDDEN)
        stem = f"model.layers.0.mlp.experts.{expert}.{part}_proj"
        found, weights[stem] = make(rng, rows, columns)
        tensors.update({f"{stem}.{suffix}": tensor for suffix, tensor in found.items()})
    config = {
        **base_config("deepseek"),
        "num_hidden_layers": 1,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "quantization_config": said,
    }
    write_directory(path, tensors, config)
    return weights


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
    KINDS["awq"][1]["version"] = "gemv"
    try:
        directory(tmp_path, "awq")
    finally:
        KINDS["awq"][1]["version"] = "gemm"
    with (
        pytest.raises(CheckpointError, match="AWQ's version 'gemv'"),
        Checkpoint.open(tmp_path) as c,
    ):
        find_experts(c)
