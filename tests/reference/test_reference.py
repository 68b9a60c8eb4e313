"""The references themselves: FMA against exact rationals, exp against float64,
the exact model against the oracle.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.experts.activation import Activation
from ktk.experts.fma import fma
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import bf16_to_f32, e4m3_table, f32_to_bf16
from ktk.experts.rows import quantise_activations
from ktk.experts.spec import MoESpec
from ktk.reference import activation
from ktk.reference.gradients import oracle_slopes
from ktk.reference.moe import ExactExperts, oracle_activation, oracle_forward
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_float32(exact: Fraction) -> np.float32:
    """Round-to-nearest-even from the two float32 neighbours of the float64 approximation."""
    guess = np.float32(float(exact))
    with np.errstate(over="ignore"):
        best = [np.nextafter(guess, np.float32(side)) for side in (-np.inf, guess, np.inf)]
    best = [b for b in best if np.isfinite(b)]
    error = [abs(Fraction(float(b)) - exact) for b in best]
    least = min(error)
    ties = [b for b, e in zip(best, error, strict=True) if e == least]
    even = [b for b in ties if not int(np.float32(b).view(np.uint32)) & 1]
    return (even or ties)[0]


@settings(max_examples=500, deadline=None)
@given(finite, finite, finite)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = fma(np.array([a], np.float32), np.array([b], np.float32), np.array([c], np.float32))[0]
    if abs(exact) <= Fraction(float(np.finfo(np.float32).max)):
        assert got == nearest_float32(exact)


def test_fma_rounds_once_where_float64_would_round_twice() -> None:
    """a*b lies halfway between two float32; c, lost in a float64 sum, decides."""
    rng = np.random.default_rng(0)
    differs = 0
    for _ in range(200):
        i, j = (2 * rng.integers(0, 600, 2) + 1).tolist()
        a, b = np.float32(1 + i * 2.0**-12), np.float32(1 + j * 2.0**-12)
        c = np.float32(rng.choice([-1, 1]) * 2.0 ** -int(rng.integers(55, 90)))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        got = fma(np.array([a]), np.array([b]), np.array([c]))[0]
        assert got == nearest_float32(exact)
        differs += got != np.float32(float(a) * float(b) + float(c))
    assert differs > 50  # the cases do exercise single rounding


def test_fma_passes_non_finite_values_on() -> None:
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    got = fma(
        np.array([inf, inf, 1, nan, 0], np.float32),
        np.float32(1),
        np.array([1, -inf, inf, 1, 0], np.float32),
    )
    assert_exact(np.array([np.inf, np.nan, np.inf, np.nan, 0], np.float32), got)


def test_exp_is_within_two_ulp() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
    assert (np.abs(activation.exp(x) - want) / ulp).max() <= 2.0


ACTIVATIONS = [
    Activation.silu(),
    Activation.silu(limit=2.0),
    Activation.swigluoai(),
    Activation.swigluoai(1.702, 2.0, gate_floor=True),
    Activation.gelu_tanh(),
    Activation.relu2(),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no_gate"])
def test_activation_follows_its_definition(act: Activation, has_gate: bool) -> None:
    rng = np.random.default_rng(1)
    gate, up = (rng.standard_normal((2, 4000)) * 6).astype(np.float32)
    got = activation.activate(gate if has_gate else None, up, act)
    want = oracle_activation(gate.astype(float) if has_gate else None, up.astype(float), act)
    # The definition of gelu cancels in 1 + tanh: below 1e-12 it is the oracle that is wrong.
    np.testing.assert_allclose(
        got, want, rtol=2e-6, atol=1e-11 if act.kind == "gelu_tanh" else 1e-30
    )


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_slopes_far_from_zero_are_the_limits(act: Activation) -> None:
    far = np.array([-1e4, -710.0, -400.0, 400.0, 710.0, 1e4])  # exp(710) overflows
    slopes = oracle_slopes(None, far, act)[1]
    limits = 2 * np.maximum(far, 0) if act.kind == "relu2" else np.sign(far) / 2 + 0.5
    np.testing.assert_allclose(slopes, limits, rtol=0, atol=1e-100)
    assert np.isfinite(oracle_slopes(far, np.ones(6), act)).all()
    near = np.array([-3.0, 0.5])
    step = [oracle_activation(None, near + by, act) for by in (1e-6, -1e-6)]
    np.testing.assert_allclose(
        oracle_slopes(None, near, act)[1], (step[0] - step[1]) / 2e-6, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_activation_keeps_nan(act: Activation) -> None:
    nan, one = np.full(4, np.nan, np.float32), np.ones(4, np.float32)
    assert np.isnan(activation.activate(nan, one, act)).all()
    assert np.isnan(activation.activate(one, nan, act)).all()
    assert np.isnan(activation.activate(None, nan, act)).all()


def test_bf16_rounds_half_to_even_and_keeps_nan() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = bf16_to_f32(bits)
    assert_exact(
        np.where(np.isnan(values), bits | 0x40, bits).astype(np.uint16), f32_to_bf16(values)
    )
    half = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.nan], np.float32)
    assert f32_to_bf16(half).tolist() == [0x3F80, 0x3F82, 0x7FC0]


def test_e4m3_table_holds_the_known_values() -> None:
    table = e4m3_table()
    assert (
        table[0x7E] == 448 and table[0x08] == 2**-6 and table[0x01] == 2**-9 and table[0xB8] == -1
    )
    assert np.isnan(table[[0x7F, 0xFF]]).all() and np.isfinite(np.delete(table, [0x7F, 0xFF])).all()


def test_quantised_activations_state_nan_zero_and_halves() -> None:
    x = np.zeros((1, 96), np.float32)
    x[0, 0], x[0, 1], x[0, 2] = 127, 0.5, 1.5  # scale 1: halves go to even
    x[0, 32] = np.inf
    q = quantise_activations(x, 96, 32)
    assert q.codes[0, :3].tolist() == [127, 0, 2]
    assert_exact(np.array([[1, np.nan, 0]], np.float32), q.scales)
    assert not q.codes[0, 32:].any()


@pytest.mark.parametrize("name", PANELS)
@pytest.mark.parametrize("kind", ["silu", "swigluoai_bias", "relu2_no_gate"])
def test_exact_model_is_near_the_float64_oracle_of_its_own_weights(name: str, kind: str) -> None:
    extra = {
        "silu": {},
        "swigluoai_bias": {"has_bias": True, "activation": Activation.swigluoai()},
        "relu2_no_gate": {"has_gate": False, "activation": Activation.relu2()},
    }[kind]
    spec = MoESpec(4, 96, 80, name, **extra)
    packed = pack_all(spec, random_experts(spec, 5))
    exact = ExactExperts(packed)
    x = random_hidden(9, 96, 6)
    ids, weights = random_routing(9, 2, 4, 7)
    want = oracle_forward([exact.dequantised(e) for e in range(4)], spec, x, ids, weights)
    error = np.linalg.norm(exact.forward(x, ids, weights) - want) / np.linalg.norm(want)
    # Float formats differ by fp32 sums only, codes of 4 bits by activations of 15; integer ones by
    # 8-bit activations, the more the longer their groups (2 % of these activations are ten times
    # the rest).
    if spec.format.is_fine:
        assert 1e-6 < error < 3e-4
        return
    assert error < {0: 1e-6, 32: 0.02, 64: 0.025, 128: 0.03, 256: 0.03}[spec.activation_group]
