"""Formats, layout and packing: round trips, byte budgets, what the scale search gains,
hostile values.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ktk._cy import native_module
from ktk.experts.activation import Activation
from ktk.experts.formats import PANELS, get_format
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.experts.layout import EXPERT_ALIGN
from ktk.experts.panels import lay_panels, read_panels
from ktk.experts.spec import MoESpec
from ktk.quantise import pack
from ktk.reference.moe import ExactExperts
from ktk.reference.pack import quantise_weights
from make.cases import assert_exact, pack_all, random_experts

SEARCHED = [(f.name, g) for f in PANELS.values() if f.search for g in f.group_sizes]
EVERY = [(f.name, g) for f in PANELS.values() for g in f.group_sizes]


@pytest.mark.parametrize(("name", "group"), SEARCHED)
@pytest.mark.parametrize("shape", [(16, 32), (17, 33), (1, 1), (40, 192), (31, 300)], ids=str)
def test_every_quantiser_finds_the_reference_codes(
    name: str, group: int, shape: tuple[int, int]
) -> None:
    spec = MoESpec(1, shape[1], shape[0], name, group)
    layout = spec.layout.gate_up
    w = random_experts(spec, 3)[0].up
    w[0] = 0
    want = lay_panels(*quantise_weights(w, layout), layout)
    got = np.zeros_like(want)
    pack._pack_numba(w, layout, got)
    assert_exact(want, got)
    native = native_module()
    for isa in () if native is None else native.isa_rows():
        if pack.cpu.missing(isa, pack.cpu.detect()):
            continue
        got[:] = 0
        native.pack_matrix(w, layout, isa, layout.ladder, layout.format.search.refits, got)
        assert_exact(want, got)


@pytest.mark.parametrize("value", [1e-38, 1e-31, 1e20, 3e38])
def test_quantisers_agree_on_extreme_weights(value: float) -> None:
    spec = MoESpec(1, 64, 16, "int4", 32)
    layout = spec.layout.gate_up
    w = (random_experts(spec, 4)[0].up * value).clip(-3e38, 3e38)
    want = lay_panels(*quantise_weights(w, layout), layout)
    got = np.zeros_like(want)
    pack._pack_numba(w, layout, got)
    assert_exact(want, got)
    got[:] = 0
    pack.pack_matrix(w, layout, got)
    assert_exact(want, got)


@pytest.mark.parametrize(("name", "group"), SEARCHED)
def test_panels_read_back_as_they_were_laid(name: str, group: int) -> None:
    spec = MoESpec(1, 100, 37, name, group)
    layout = spec.layout.gate_up
    codes, scales = quantise_weights(random_experts(spec, 1)[0].up, layout)
    read_codes, read_scales = read_panels(lay_panels(codes, scales, layout), layout)
    assert_exact(codes, read_codes)
    assert_exact(scales, read_scales)


# Relative mean squared error of normal weights: (searched at most, searched over absmax at most).
GAIN = {
    ("int4", 32): (0.0072, 0.75),
    ("int4", 64): (0.0090, 0.75),
    ("int4", 128): (0.0105, 0.75),
    ("int4", 0): (0.0140, 0.70),
    ("int8", 0): (8e-5, 1.001),
}


@pytest.mark.parametrize(("name", "group"), SEARCHED)
def test_searched_scales_beat_absmax(name: str, group: int) -> None:
    spec = MoESpec(1, 1024, 64, name, group)
    layout, fmt = spec.layout.gate_up, get_format(name)
    w = np.random.default_rng(2).standard_normal((64, 1024)).astype(np.float32)

    def error(ladder: np.ndarray | None) -> float:
        codes, scales = quantise_weights(w, layout, ladder)
        spread = np.repeat(scales, layout.group_size, axis=1)[:, : layout.padded_in]
        return float(np.mean((w - (codes.astype(np.float32) - fmt.zero_point) * spread) ** 2))

    most, ratio = GAIN[name, group]
    searched, absmax = error(None), error(np.array([fmt.code_max], np.float32))
    assert searched <= most
    assert searched <= ratio * absmax


@pytest.mark.parametrize(("name", "group"), EVERY)
def test_bits_per_weight_stay_in_budget(name: str, group: int) -> None:
    budget = {("int4", 32): 4.6, ("int4", 64): 4.35, ("int4", 128): 4.2, ("int4", 0): 4.1}
    for n in (2, 3, 4):
        budget |= {(f"nl{n}", 16): n + 0.3, (f"nl{n}", 32): n + 0.17, (f"nl{n}", 0): n + 0.04}
    budget |= {("mxfp4", 32): 4.27, ("nvfp4", 16): 4.53, ("mxfp8", 32): 8.27}
    budget |= {("int4_asym", 32): 4.65, ("int4_asym", 64): 4.35, ("int4_asym", 128): 4.18}
    spec = MoESpec(128, 2048, 768, name, group)
    bits = spec.layout.expert_bytes * 8 / spec.num_weights
    assert PANELS[name].bits <= bits <= budget.get((name, group), PANELS[name].bits * 1.01)
    assert spec.layout.expert_bytes % EXPERT_ALIGN == 0


def test_bf16_and_fp32_keep_their_weights() -> None:
    for name in ("bf16", "fp32"):
        spec = MoESpec(2, 50, 18, name, has_bias=True)
        experts = random_experts(spec, 8)
        rounded = [
            e._replace(**{n: _bf16(getattr(e, n)) for n in ("gate", "up", "down")}) for e in experts
        ]
        exact = ExactExperts(pack_all(spec, rounded))
        for e, weights in enumerate(rounded):
            for want, got in zip(weights, exact.dequantised(e), strict=True):
                assert_exact(want, np.ascontiguousarray(got))


def _bf16(w: np.ndarray) -> np.ndarray:
    return bf16_to_f32(f32_to_bf16(w))


def test_bf16_bits_pack_like_their_floats() -> None:
    for name in PANELS:
        spec = MoESpec(1, 64, 48, name)
        floats = random_experts(spec, 9)[0]
        bits = [f32_to_bf16(w) for w in floats[:3]]
        as_bits = pack_all(spec, [floats._replace(gate=bits[0], up=bits[1], down=bits[2])])
        as_floats = pack_all(
            spec,
            [
                floats._replace(
                    gate=_bf16(floats.gate), up=_bf16(floats.up), down=_bf16(floats.down)
                )
            ],
        )
        assert_exact(as_floats.data, as_bits.data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", PANELS)
def test_non_finite_weights_are_refused(name: str, bad: float) -> None:
    spec = MoESpec(1, 64, 40, name)
    weights = random_experts(spec, 1)[0]
    weights.down[63, 39] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        pack_all(spec, [weights])
    with pytest.raises(ValueError, match="NaN or inf"):
        pack_all(spec, [weights._replace(down=f32_to_bf16(weights.down))])
    if PANELS[name].search is None:
        return
    panels = np.zeros((spec.layout.down.num_panels, spec.layout.down.panel_bytes), np.uint8)
    with pytest.raises(ValueError, match="NaN or inf"):
        pack._pack_numba(weights.down, spec.layout.down, panels)


def test_wrong_shapes_and_dtypes_are_named() -> None:
    spec = MoESpec(1, 64, 48, "int8")
    good = random_experts(spec, 1)[0]
    out = np.zeros(spec.layout.expert_bytes, np.uint8)
    for field, value, error, text in (
        ("gate", None, ValueError, "gate is missing"),
        ("up", good.down, ValueError, "up has shape"),
        ("down", good.down.astype(np.float64), TypeError, "down has dtype float64"),
        ("up_bias", np.zeros(48, np.float32), ValueError, "up_bias is given"),
    ):
        with pytest.raises(error, match=text):
            pack.pack_expert(spec, good._replace(**{field: value}), out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"hidden_size": -1}, "hidden_size=-1"),
        ({"intermediate_size": 2.5}, "intermediate_size=2.5"),
        ({"weight_format": "int5"}, "int8, fp8, fp8_channel, fp8_e5m2, mxfp8, bf16, fp32"),
        ({"group_size": 48}, "group_size=48"),
        ({"activation_group": 7}, "activation_group=7"),
        ({"group_size": 32.0}, "group_size=32.0"),
        ({"group_size": False}, "group_size=False"),
        ({"weight_format": "int8", "group_size": 32, "activation_group": 32}, "int8 takes 0"),
    ],
    ids=str,
)
def test_bad_specs_say_what_is_allowed(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(MoESpec(8, 64, 64), **change)


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 1e39},
        {"alpha": 10**400},
        {"alpha": np.nan},
        {"up_offset": np.inf},
        {"gate_min": np.inf},
        {"gate_max": -np.inf},
        {"up_min": 2.0, "up_max": 1.0},
        {"gate_max": np.nan},
        {"alpha": "1"},
    ],
    ids=str,
)
def test_bad_activations_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="activation"):
        Activation(**fields)  # type: ignore[arg-type]


def test_specs_survive_json() -> None:
    spec = MoESpec(8, 64, 96, "int4", 64, 32, has_bias=True, activation=Activation.swigluoai())
    assert MoESpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match="unknown fields"):
        MoESpec.from_json({**spec.to_json(), "colour": 1})
