"""Every coding of weights is read exactly, as its definition has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktk.checkpoint import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import f32_to_bf16
from ktk.models import find_experts
from ktk.models.codings import decode, infer_coding
from ktk.models.codings.scaled import e8m0_to_f32
from make.checkpoints import (
    Expected,
    assert_holds,
    base_config,
    bf16_like,
    e4m3,
    e4m3_codes,
    write_directory,
)

# codings


def one_layer(path: Path, tensors: dict[str, Any], **config: Any) -> Checkpoint:
    write_directory(path, tensors, {**base_config("deepseek"), "num_hidden_layers": 1, **config})
    return Checkpoint.open(path)


def coded(
    rng: np.random.Generator,
    shape: tuple[int, int],
    coding: str,
    block: tuple[int, int] = (128, 128),
) -> tuple[dict[str, Any], np.ndarray]:
    """Random tensors of one coded matrix, by suffix, and its weights as float32."""
    rows, columns = shape
    codes = e4m3_codes(rng, rows, columns)
    if coding in ("block", "block_bf16", "block_e8m0"):
        size = (-(-rows // block[0]), -(-columns // block[1]))
        scale = bf16_like(rng, *size)
        spread = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[:rows, :columns]
        if coding == "block_bf16":
            return {"weight": ("F8_E4M3", codes), "weight_scale_inv": f32_to_bf16(scale)}, e4m3(
                codes
            ) * spread
        if coding == "block_e8m0":
            power = rng.integers(110, 130, size, dtype=np.uint8)
            spread = np.repeat(np.repeat(e8m0_to_f32(power), block[0], 0), block[1], 1)[
                :rows, :columns
            ]
            return {"weight": ("F8_E4M3", codes), "scale": ("F8_E8M0", power)}, e4m3(codes) * spread
        return {"weight": ("F8_E4M3", codes), "weight_scale_inv": scale}, e4m3(codes) * spread
    if coding in ("channel", "channel_1d"):
        scale = bf16_like(rng, rows, 1)
        stored = scale if coding == "channel" else scale[:, 0]
        return {"weight": ("F8_E4M3", codes), "weight_scale": stored}, e4m3(codes) * scale
    if coding == "tensor":
        scale = bf16_like(rng, 1)
        tensors = {
            "weight": ("F8_E4M3", codes),
            "weight_scale": scale[0].reshape(()),
            "input_scale": scale,
        }
        return tensors, e4m3(codes) * scale
    power = rng.integers(110, 130, (rows, columns // 32), dtype=np.uint8)
    spread = np.repeat(e8m0_to_f32(power), 32, 1)
    if coding == "mxfp8":
        return {"weight": ("F8_E4M3", codes), "weight_scale_inv": power}, e4m3(codes) * spread
    assert coding == "mxfp4"
    value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    nibbles = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    w = value[nibbles & 7] * np.where(nibbles & 8, -1, 1).astype(np.float32)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int8)
    return {"weight": packed, "scale": ("F8_E8M0", power)}, w * spread


CODINGS = ("block", "block_bf16", "block_e8m0", "channel", "channel_1d", "tensor", "mxfp8", "mxfp4")


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("sizes", [(256, 128), (160, 96), (64, 32)], ids=str)
def test_every_coding_is_decoded(tmp_path: Path, coding: str, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    h, i = sizes
    tensors: dict[str, Any] = {}
    expected = Expected({0: [{}, {}]})
    for expert in range(2):
        for role, shape in (("gate", (i, h)), ("up", (i, h)), ("down", (h, i))):
            stored, w = coded(rng, shape, coding)
            expected.experts[0][expert][role] = w
            for suffix, array in stored.items():
                tensors[f"model.layers.0.mlp.experts.{expert}.{role}_proj.{suffix}"] = array
    checkpoint = one_layer(tmp_path, tensors, num_experts=2, hidden_size=h, moe_intermediate_size=i)
    experts = find_experts(checkpoint)
    assert experts.source_dtype == (coding if coding.startswith("mx") else "fp8")
    assert experts.tensor_names(0) == set(tensors)
    assert_holds(experts, expected)


def test_fp8_block_size_comes_from_the_config(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    tensors: dict[str, Any] = {}
    expected = Expected({0: [{}]})
    for role, shape in (("gate", (48, 96)), ("up", (48, 96)), ("down", (96, 48))):
        stored, expected.experts[0][0][role] = coded(rng, shape, "block", (16, 32))
        tensors.update(
            {f"model.layers.0.mlp.experts.0.{role}_proj.{s}": a for s, a in stored.items()}
        )
    sizes = {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "hidden_size": 96,
        "moe_intermediate_size": 48,
    }
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    checkpoint = one_layer(tmp_path, tensors, **sizes, quantization_config=quantization)
    assert_holds(find_experts(checkpoint), expected)
    for bad in ([16], [0, 32], ["16", 32], 16, [16.0, 32]):
        quantization["weight_block_size"] = bad  # type: ignore[assignment]
        checkpoint = one_layer(tmp_path, tensors, **sizes, quantization_config=quantization)
        with pytest.raises(CheckpointError, match="weight_block_size"):
            find_experts(checkpoint)


def test_stacked_fp8_is_decoded(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    h, i = 160, 96
    both = [coded(rng, (2 * i, h), "block") for _ in range(2)]
    down = [coded(rng, (h, i), "block") for _ in range(2)]
    base = "model.layers.0.mlp.experts"
    tensors = {
        f"{base}.gate_up_proj": ("F8_E4M3", np.stack([c["weight"][1] for c, _ in both])),
        f"{base}.gate_up_proj_scale_inv": np.stack([c["weight_scale_inv"] for c, _ in both]),
        f"{base}.down_proj": ("F8_E4M3", np.stack([c["weight"][1] for c, _ in down])),
        f"{base}.down_proj_scale_inv": np.stack([c["weight_scale_inv"] for c, _ in down]),
    }
    checkpoint = one_layer(tmp_path, tensors, num_experts=2, hidden_size=h, moe_intermediate_size=i)
    wanted = [
        {"gate": g[:i], "up": g[i:], "down": d} for (_, g), (_, d) in zip(both, down, strict=True)
    ]
    assert_holds(find_experts(checkpoint), Expected({0: wanted}))


def test_e8m0_is_exact_over_its_range() -> None:
    got = e8m0_to_f32(np.arange(256, dtype=np.uint8))
    np.testing.assert_array_equal(got[:255], np.ldexp(1.0, np.arange(255) - 127).astype(np.float32))
    assert np.isnan(got[255])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scale_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    rng = np.random.default_rng(8)
    tensors: dict[str, Any] = {}
    for role, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
        stored, _ = coded(rng, shape, "channel")
        tensors.update(
            {f"model.layers.0.mlp.experts.0.{role}_proj.{s}": a for s, a in stored.items()}
        )
    tensors["model.layers.0.mlp.experts.0.up_proj.weight_scale"][3] = value
    experts = find_experts(one_layer(tmp_path, tensors, num_experts=1, num_experts_per_tok=1))
    with pytest.raises(CheckpointError, match="up_proj.weight_scale.*NaN or infinite"):
        experts.read(0, 0)


def test_gpt_oss_mxfp4_equals_the_published_dequantisation(tmp_path: Path) -> None:
    """Two independent statements of the format: ours,
    and value by value from the OCP definition.
    """
    from ktk.checkpoint.safetensors import TensorInfo

    info = TensorInfo("U8", (1, 16), tmp_path, 0, 16)
    coding = infer_coding("w", info, "s", TensorInfo("U8", (1, 1), tmp_path, 0, 1), (128, 128))
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16) | 0x70  # high nibble 7: 6.0
    got = decode(coding, codes, np.array([[0.25]], np.float32))
    low = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    np.testing.assert_array_equal(got[0, 0::2], np.array(low, np.float32) / 4)
    np.testing.assert_array_equal(got[0, 1::2], np.full(16, 1.5, np.float32))
