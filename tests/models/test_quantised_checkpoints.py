"""Checkpoints that other tools quantised: GPTQ, compressed-tensors, fp8, MXFP4,
into packed experts without a bf16 detour.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5")

import torch

from ktk import backends
from ktk.checkpoint import Checkpoint, read_config, read_layer
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.experts.panels import read_panels
from ktk.experts.stored import CodedExpert
from ktk.integration.transformers import KtkConfig, load_model
from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.loading import packed_modules
from ktk.models import find_experts
from ktk.reference.moe import ExactExperts
from make.checkpoints import write_safetensors
from make.fp8_directory import SEED, to_fp8
from make.transformers_cases import experts_of, make_model, run

WIDE = {"hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 4, "head_dim": 32}


def pack_words(codes: np.ndarray) -> np.ndarray:
    """Codes 0 to 15 (rows, columns) to int32 (rows, columns / 8), the first in the lowest bits."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i in range(8):
        words |= codes[:, i::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def codes_and_scales(
    rng: np.random.Generator, shape: tuple[int, int], group: int, scale_bits: str
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 codes (N, K), 0 to 15, and scales (N, groups) that ``scale_bits`` holds."""
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    scales = rng.uniform(0.005, 0.03, (shape[0], shape[1] // group)).astype(np.float32)
    return codes, bf16_to_f32(f32_to_bf16(scales)) if scale_bits == "bf16" else scales.astype(
        np.float16
    ).astype(np.float32)


def gptq(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, version: str, g_idx: np.ndarray
) -> dict[str, Any]:
    zeros = np.full(scales.shape, 8, np.uint8) if zeros is None else zeros
    stored = (zeros - (version == "gptq")) & 15
    return {
        "qweight": ("I32", pack_columns(codes)),
        "qzeros": ("I32", pack_words(np.ascontiguousarray(stored.T))),
        "scales": scales.T.astype(np.float16),
        "g_idx": ("I32", g_idx.astype(np.int32)),
    }


def pack_columns(codes: np.ndarray) -> np.ndarray:
    """Codes (N, K) to int32 (K / 8, N): eight of a column to a word."""
    return np.ascontiguousarray(pack_words(codes).T)


def compressed(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "weight_packed": ("I32", pack_words(codes)),
        "weight_scale": f32_to_bf16(scales),
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if zeros is not None:
        found["weight_zero_point"] = ("I32", pack_columns(zeros.T).copy())
    return found


class Int4Checkpoint:
    """A tiny Qwen3-MoE directory whose linear layers are 4-bit codes.

    weights : name -> float32 they stand for.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        group: int = 32,
        is_symmetric: bool = True,
        version: str = "gptq",
        is_reordered: bool = False,
        scale_bits: str = "bf16",
    ) -> None:
        self.path, self.codes, self.scales, self.weights = path, {}, {}, {}
        model = make_model("qwen3_moe", torch.bfloat16, **WIDE)
        model.save_pretrained(path)
        rng = np.random.default_rng(SEED)
        tensors: dict[str, Any] = {}
        with Checkpoint.open(path) as plain:
            for name, info in plain.tensors.items():
                if not name.endswith("_proj.weight"):
                    tensors[name] = plain.read(name)
                    continue
                stem = name.removesuffix(".weight")
                size = info.shape[1] if group == 0 else group
                codes, scales = codes_and_scales(rng, info.shape, size, scale_bits)
                zeros = None
                if not is_symmetric:
                    zeros = rng.integers(1, 16, scales.shape, dtype=np.uint8)
                groups = np.arange(info.shape[1]) // size
                if is_reordered:
                    groups = rng.permutation(groups)
                zero = np.full(scales.shape, 8) if zeros is None else zeros
                self.codes[stem], self.scales[stem] = codes, scales
                self.weights[name] = (
                    codes.astype(np.float32) - zero.astype(np.float32)[:, groups]
                ) * scales[:, groups]
                if kind == "gptq":
                    parts = gptq(codes, scales, zeros, version, groups)
                else:
                    parts = compressed(codes, scales, zeros)
                tensors.update({f"{stem}.{suffix}": part for suffix, part in parts.items()})
        write_safetensors(path / "model.safetensors", tensors)
        self.config = json.loads((path / "config.json").read_text())
        said: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": group or -1}
        if kind == "gptq":
            said["checkpoint_format"] = version
        else:
            weights = {
                "num_bits": 4,
                "type": "int",
                "symmetric": is_symmetric,
                "group_size": group or None,
            }
            said = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            }
        self.config["quantization_config"] = said
        (path / "config.json").write_text(json.dumps(self.config))

    def float_model(self) -> Any:
        """The model with the floats the codes stand for."""
        model = make_model("qwen3_moe", torch.float32, **WIDE)
        state = model.state_dict()
        for name, weight in self.weights.items():
            if ".experts." in name:
                layer, _, rest = name.partition(".experts.")
                expert, part = rest.split(".")[:2]
                target = state[
                    f"{layer}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
                ]
                half = target.shape[1] // 2
                rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}.get(
                    part, slice(None)
                )
                target[int(expert), rows] = torch.from_numpy(weight)
            else:
                state[name].copy_(torch.from_numpy(weight).bfloat16())
        return model


def panel_codes(
    experts: ExactExperts, expert: int, projection: str
) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned codes (out, in) and scales (out, groups) of a packed projection."""
    matrix = experts.matrix(projection)
    codes, scales = read_panels(np.ascontiguousarray(experts.panels(expert, projection)), matrix)
    return codes[: matrix.out_features, : matrix.in_features], scales[: matrix.out_features]


@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("kind", ["gptq", "compressed"])
def test_symmetric_codes_and_scales_carry_over_exactly(
    kind: str, group: int, tmp_path: Path
) -> None:
    made = Int4Checkpoint(tmp_path / "in", kind, group)
    convert(tmp_path / "in", tmp_path / "out", quant_method="int4")
    packed = read_config(tmp_path / "out")
    assert packed.source_dtype == "int4"
    assert {spec.group_size for spec in packed.specs.values()} == {group}
    for layer in packed.layers:
        experts = ExactExperts(read_layer(tmp_path / "out", layer))
        for expert in range(4):
            for part in ("gate", "up", "down"):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                codes, scales = panel_codes(experts, expert, part)
                assert np.array_equal(codes, made.codes[stem])
                assert np.array_equal(scales, made.scales[stem])


@pytest.mark.parametrize("kind", ["gptq", "compressed"])
def test_smaller_groups_repeat_the_scales_and_bigger_ones_quantise_anew(
    kind: str, tmp_path: Path
) -> None:
    made = Int4Checkpoint(tmp_path / "in", kind, 64)
    stem = "model.layers.1.mlp.experts.2.up_proj"
    for group, keeps in ((32, True), (64, True), (128, False)):
        convert(tmp_path / "in", tmp_path / f"{group}", quant_method="int4", group_size=group)
        codes, scales = panel_codes(ExactExperts(read_layer(tmp_path / f"{group}", 1)), 2, "up")
        assert np.array_equal(codes, made.codes[stem]) == keeps
        if keeps:
            assert np.array_equal(scales, np.repeat(made.scales[stem], 64 // group, axis=1))


def test_fp16_scales_round_to_bf16_and_codes_stay(tmp_path: Path) -> None:
    made = Int4Checkpoint(tmp_path / "in", "gptq", 32, scale_bits="fp16")
    convert(tmp_path / "in", tmp_path / "out", quant_method="int4")
    codes, scales = panel_codes(ExactExperts(read_layer(tmp_path / "out", 0)), 3, "down")
    stem = "model.layers.0.mlp.experts.3.down_proj"
    assert np.array_equal(codes, made.codes[stem])
    want = made.scales[stem]
    assert np.array_equal(scales, bf16_to_f32(f32_to_bf16(want)))
    assert 0 < np.abs(scales / want - 1).max() <= 2.0**-8


VARIANTS: dict[str, dict[str, Any]] = {
    "gptq asymmetric": {"kind": "gptq", "is_symmetric": False},
    "gptq v2 asymmetric": {"kind": "gptq", "is_symmetric": False, "version": "gptq_v2"},
    "gptq v2 symmetric": {"kind": "gptq", "version": "gptq_v2"},
    "gptq reordered": {"kind": "gptq", "is_reordered": True},
    "compressed asymmetric": {"kind": "compressed", "is_symmetric": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_is_what_the_codes_stand_for(variant: str, tmp_path: Path) -> None:
    made = Int4Checkpoint(tmp_path / "in", **VARIANTS[variant])
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        experts = find_experts(checkpoint)
        keeps_codes = isinstance(experts.read_stored(1, 2), CodedExpert)
        got = experts.read(1, 2)
    assert keeps_codes == (variant != "gptq reordered")
    for part in ("gate", "up", "down"):
        want = made.weights[f"model.layers.1.mlp.experts.2.{part}_proj.weight"]
        assert np.array_equal(getattr(got, part), want)
    convert(tmp_path / "in", tmp_path / "out", quant_method="int8")
    with Checkpoint.open(tmp_path / "out") as out:
        name = "model.layers.0.self_attn.q_proj.weight"
        assert np.array_equal(out.read(name), f32_to_bf16(made.weights[name]))
        assert not any(
            "q_proj." in n and n != name.replace("0", n.split(".")[2]) for n in out.tensors
        )


@pytest.mark.parametrize(
    "variant",
    [
        {"kind": "gptq", "group": 64},
        {"kind": "compressed", "group": 32},
        {"kind": "gptq", "is_symmetric": False},
        {"kind": "compressed", "group": 0},
    ],
    ids=lambda v: " ".join(map(str, v.values())),
)
def test_load_model_of_4_bit_checkpoints(variant: dict[str, Any], tmp_path: Path) -> None:
    made = Int4Checkpoint(tmp_path / "in", **variant)
    loaded, info = load_model(tmp_path / "in", dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = made.float_model()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, want.state_dict()[name]), name
    for packed, plain in zip(experts_of(loaded), experts_of(want), strict=True):
        experts = ExactExperts(handle_of(packed).moe.packed)
        is_symmetric = variant.get("is_symmetric", True)
        assert experts.spec.weight_format == ("int4" if is_symmetric else "int4_asym")
        for e in range(4):
            got = experts.dequantised(e)
            both = torch.from_numpy(np.concatenate([got.gate, got.up]))
            assert torch.equal(both, plain.gate_up_proj[e])
    logits = run(loaded)[0]
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(load_model(tmp_path / "saved"))[0], logits)


def test_load_model_of_fp8_blocks_equals_its_conversion(tmp_path: Path) -> None:
    make_model("deepseek_v3", torch.bfloat16).save_pretrained(tmp_path / "in")
    to_fp8(tmp_path / "in")
    loaded, info = load_model(tmp_path / "in", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(row.kernel.endswith("fp8 g128") for row in packed_modules(loaded))
    convert(tmp_path / "in", tmp_path / "out", quant_method="fp8")
    converted = load_model(tmp_path / "out")
    for got, want in zip(run(loaded), run(converted), strict=True):
        assert torch.equal(got, want)
    asked = load_model(tmp_path / "in", quantization_config=KtkConfig("int4", group_size=64))
    assert all("int4 g64" in row.kernel for row in packed_modules(asked))
    rotated = load_model(tmp_path / "in", quantization_config=KtkConfig("int8", rotation=64))
    rotated.save_pretrained(tmp_path / "rotated")
    convert(tmp_path / "in", tmp_path / "turned", quant_method="int8", rotation=64)
    for layer, spec in read_config(tmp_path / "rotated").specs.items():
        assert spec.turns == (64, 0)
        made = read_layer(tmp_path / "turned", layer).data
        assert np.array_equal(read_layer(tmp_path / "rotated", layer).data, made)


def mxfp4_directory(path: Path) -> None:
    """A tiny gpt-oss directory with experts in MXFP4."""
    model = make_model("gpt_oss", torch.bfloat16)
    model.save_pretrained(path)
    rng = np.random.default_rng(SEED)
    tensors: dict[str, Any] = {}
    with Checkpoint.open(path) as plain:
        for name, info in plain.tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                tensors[name] = plain.read(name)
                continue
            e, ins, outs = info.shape
            tensors[f"{name}_blocks"] = rng.integers(
                0, 256, (e, outs, ins // 32, 16), dtype=np.uint8
            )
            tensors[f"{name}_scales"] = rng.integers(119, 124, (e, outs, ins // 32), dtype=np.uint8)
    write_safetensors(path / "model.safetensors", tensors)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(config))


def test_mxfp4_runs_as_blocks_of_the_same_numbers(tmp_path: Path) -> None:
    if reason := backends.backends()["LLAMAFILE"].why_not():
        pytest.skip(f"LLAMAFILE: {reason}")
    mxfp4_directory(tmp_path)
    loaded, info = load_model(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all("MXFP4" in row.kernel for row in packed_modules(loaded))
    assert all(row.bits_per_weight == 4.25 for row in packed_modules(loaded))
    with Checkpoint.open(tmp_path) as checkpoint:
        experts = find_experts(checkpoint)
        for layer in experts.layers:
            blocks = experts.mxfp4_experts(layer)
            for e in range(blocks.spec.num_experts):
                got, want = expert_weights(blocks, e), experts.read(layer, e)
                for g, w in zip(got, want, strict=True):
                    assert np.array_equal(g, w)
    named = load_model(tmp_path, quantization_config=KtkConfig("bf16"))
    logits, exact = run(loaded)[0], run(named)[0]
    assert (logits - exact).abs().mean() <= 0.05 * exact.abs().mean()
    named.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(load_model(tmp_path / "saved"))[0], exact)
    with pytest.raises(ValueError, match="rotation=64: gguf takes 0"):
        load_model(tmp_path, quantization_config=KtkConfig(None, rotation=64))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 8}, "GPTQ of 8 bits is not read: must be 4"),
        ({"quant_method": "awq"}, r"scales.*must be F16 or BF16 or F32 \(4, 2048\)"),
        ({"quant_method": "bnb"}, "quant_method is 'bnb': must be 'gptq'"),
        ({"bits": "4"}, "bits='4': must be an int"),
    ],
)
def test_4_bit_checkpoints_that_are_not_read_say_why(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    made = Int4Checkpoint(tmp_path, "gptq")
    made.config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    with pytest.raises(CheckpointError, match=match), Checkpoint.open(tmp_path) as checkpoint:
        find_experts(checkpoint)


@pytest.mark.parametrize(
    ("kind", "suffix", "value", "match"),
    [
        ("gptq", "g_idx", ("I32", np.full(128, 9, np.int32)), "groups must be 0 to 3"),
        ("gptq", "scales", np.full((4, 256), np.nan, np.float16), "NaN or infinite scales"),
        ("gptq", "qzeros", ("I32", np.zeros((4, 31), np.int32)), r"must be I32 \(4, 32\)"),
        ("gptq", "qzeros", None, "has no qzeros"),
        ("compressed", "weight_shape", np.array([256, 64], np.int64), r"says \(256, 64\)"),
        ("compressed", "weight_shape", np.array([-1, 1 << 60], np.int64), "so it must be"),
        ("compressed", "weight_scale", np.zeros((256, 3), np.uint16), "a multiple of groups"),
        ("compressed", "weight_g_idx", ("I32", np.zeros(128, np.int32)), "reordered columns"),
    ],
)
def test_spoiled_4_bit_tensors_are_refused(
    kind: str, suffix: str, value: Any, match: str, tmp_path: Path
) -> None:
    Int4Checkpoint(tmp_path, kind)
    name = f"model.layers.0.mlp.experts.1.up_proj.{suffix}"
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "whole.safetensors")
    with Checkpoint.open(tmp_path / "whole.safetensors") as whole:
        tensors: dict[str, Any] = {
            n: (info.dtype, whole.read(n)) for n, info in whole.tensors.items()
        }
    (tmp_path / "whole.safetensors").unlink()
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=match), Checkpoint.open(tmp_path) as checkpoint:
        find_experts(checkpoint).read(0, 1)
