"""Checkpoints of one layer in the precisions people publish, and the weights they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ktk.experts.formats.floats import f32_to_bf16
from make.checkpoints import base_config, write_directory

HIDDEN, INTERMEDIATE, EXPERTS = 128, 256, 2
ATTENTION = "model.layers.0.self_attn.q_proj"
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


def fp8_blocks(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes = small_floats(rng, (rows, columns))
    scales = rng.uniform(1e-4, 1e-2, (rows // 128, columns // 128)).astype(F)
    each = np.repeat(spread(scales, 128), 128, axis=0)
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": scales}, e4m3(codes) * each


def int4(rng: np.random.Generator, rows: int, columns: int) -> Made:
    """Symmetric, as Kimi-K2 has it: scales in bf16, one for 32."""
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    bits = f32_to_bf16(rng.uniform(1e-3, 1e-2, (rows, columns // 32)).astype(F))
    scales = (bits.astype(np.uint32) << 16).view(F)
    return {
        "weight_packed": ("I32", words(codes)),
        "weight_scale": bits,
        "weight_shape": np.array(codes.shape, np.int64),
    }, (codes.astype(F) - 8) * spread(scales, 32)


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
        partial(nvfp4, is_packed=True),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        ("nvfp4", 16),
    ),
    "nvfp4 modelopt": (
        partial(nvfp4, is_packed=False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ("nvfp4", 16),
    ),
    "awq": (
        partial(int4_asym, kind="awq"),
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        ("int4_asym", 64),
    ),
    "gptq": (
        partial(int4_asym, kind="gptq", group=32),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
        ("int4_asym", 32),
    ),
    "compressed": (
        partial(int4_asym, kind="compressed", group=128),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ("int4_asym", 128),
    ),
    "int4": (int4, {"quant_method": "compressed-tensors"}, ("int4", 32)),
    "fp8 blocks": (fp8_blocks, {"quant_method": "fp8"}, ("fp8", 128)),
    "fp8 channel": (fp8_channel, {"quant_method": "compressed-tensors"}, ("fp8_channel", 0)),
    "fp8 tensor": (fp8_tensor, {"quant_method": "modelopt"}, ("fp8_channel", 0)),
    "fp8 e5m2": (fp8_e5m2, {"quant_method": "fp8"}, ("fp8_e5m2", 0)),
    "mxfp8": (mxfp8, {"quant_method": "mxfp8"}, ("mxfp8", 32)),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}, ("mxfp4", 32)),
}


def directory(path: Path, kind: str, **said: Any) -> dict[str, np.ndarray]:
    """A checkpoint of one layer of such experts; weights by module. said : more of its
    quantization_config.
    """
    make, config_says, _ = KINDS[kind]
    rng, tensors, weights = np.random.default_rng(7), {}, {}
    for expert, part in itertools.product(range(EXPERTS), ("gate", "up", "down")):
        rows, columns = (HIDDEN, INTERMEDIATE) if part == "down" else (INTERMEDIATE, HIDDEN)
        stem = f"model.layers.0.mlp.experts.{expert}.{part}_proj"
        found, weights[stem] = make(rng, rows, columns)
        tensors.update({f"{stem}.{suffix}": tensor for suffix, tensor in found.items()})
    found, weights[ATTENTION] = make(rng, HIDDEN, HIDDEN)
    tensors.update({f"{ATTENTION}.{suffix}": tensor for suffix, tensor in found.items()})
    config = {
        **base_config("deepseek"),
        "num_hidden_layers": 1,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "quantization_config": {**config_says, **said},
    }
    write_directory(path, tensors, config)
    return weights
