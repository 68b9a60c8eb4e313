"""fp8 panels: codes and scales of a checkpoint kept bit for bit,
floats rounded to the nearest code.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ktk.checkpoint.packed import read_layer
from ktk.checkpoint.safetensors import Checkpoint
from ktk.convert import convert
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import e4m3_table, nearest_codes
from ktk.experts.panels import read_panels
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert
from ktk.models import find_experts
from ktk.quantise.coded import quantise_coded
from make.cases import assert_exact, pack_all, random_experts
from make.checkpoints import write_safetensors

F = np.float32
HIDDEN, INTERMEDIATE, EXPERTS = 320, 160, 2  # neither is whole blocks of 128


def deepseek_like(directory: Path) -> dict[str, np.ndarray]:
    """A checkpoint of one layer of fp8 experts; its tensors."""
    rng, tensors = np.random.default_rng(5), {}
    for expert in range(EXPERTS):
        for name, shape in (
            ("gate", (INTERMEDIATE, HIDDEN)),
            ("up", (INTERMEDIATE, HIDDEN)),
            ("down", (HIDDEN, INTERMEDIATE)),
        ):
            at = f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"
            codes = rng.integers(0, 256, shape, dtype=np.uint8)
            codes[(codes & 127) == 127] = 126  # NaN
            tensors[at] = codes
            blocks = [-(-n // 128) for n in shape]
            tensors[f"{at}_scale_inv"] = rng.uniform(1e-4, 1e-2, blocks).astype(F)
    directory.mkdir()
    given = {n: ("F8_E4M3", t) if t.dtype == np.uint8 else t for n, t in tensors.items()}
    write_safetensors(directory / "model.safetensors", given)
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "hidden_act": "silu",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def test_a_checkpoints_codes_and_scales_are_kept_bit_for_bit(tmp_path: Path) -> None:
    tensors = deepseek_like(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", quant_method="fp8")
    packed = read_layer(tmp_path / "out", 0)
    assert packed.spec.weight_format == "fp8" and packed.spec.bits_per_weight < 9.2  # padding
    table = e4m3_table()
    for expert in range(EXPERTS):
        for name, matrix in packed.matrices.items():
            layout = packed.spec.layout.matrix(name)
            values, scales = read_panels(matrix.data[expert], layout)
            at = f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"
            codes, stored = tensors[at], tensors[f"{at}_scale_inv"]
            rows, columns = codes.shape
            assert_exact(table[codes], np.ascontiguousarray(values[:rows, :columns]))
            assert_exact(np.repeat(stored, 128, axis=0)[:rows], np.ascontiguousarray(scales[:rows]))
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        experts = find_experts(checkpoint)
        assert isinstance(experts.read_stored(0, 1), CodedExpert)
        for want, got in zip(experts.read(0, 1), expert_weights(packed, 1), strict=True):
            assert (want is None and got is None) or np.array_equal(want, got)


def test_nan_codes_are_refused(tmp_path: Path) -> None:
    tensors = deepseek_like(tmp_path / "in")
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    tensors[name][3, 4] = 0xFF
    given = {n: ("F8_E4M3", t) if t.dtype == np.uint8 else t for n, t in tensors.items()}
    write_safetensors(tmp_path / "in" / "model.safetensors", given)
    with pytest.raises(ValueError, match="expert 1.*NaN or inf"):
        convert(tmp_path / "in", tmp_path / "out", quant_method="fp8")


def test_floats_become_the_nearest_code() -> None:
    table = e4m3_table()
    positive = table[:127]
    x = np.random.default_rng(0).standard_normal(20000).astype(F) * F(30)
    x[:4] = 0, 1e-4, 447.9, 500
    nearest = positive[np.abs(np.abs(x)[:, None].clip(0, 448) - positive).argmin(axis=1)]
    assert_exact(np.copysign(nearest, x), table[nearest_codes(x, "e4m3")])
    middle = (positive[1:] + positive[:-1]) / 2  # ties go to the even code
    assert (nearest_codes(middle, "e4m3") % 2 == 0).all()


def test_blocks_of_zeros_and_of_tiny_weights_stay_finite() -> None:
    w = np.zeros((130, 300), F)
    w[129, 299], w[0, 0] = 1e-40, 3
    coded = quantise_coded(w, MoESpec(1, 300, 130, "fp8").layout.gate_up)
    codes, scales = coded.codes, coded.scales
    assert codes.shape == w.shape and scales.shape == (2, 3)
    assert codes[0, 0] == 126 and not codes[128:].any()
    assert scales[0, 0] == F(3) / F(448) and not scales.ravel()[1:].any()


def test_rounding_costs_what_e4m3_costs() -> None:
    spec = MoESpec(1, 512, 256, "fp8")
    (weights,) = random_experts(spec, 1)
    got = expert_weights(pack_all(spec, [weights]), 0)
    error = np.square(got.down - weights.down).mean() / np.square(weights.down).mean()
    assert 1e-4 < error < 1.2e-3  # three bits of mantissa
