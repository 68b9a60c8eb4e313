"""Quantisers of ggml blocks: what the gguf package reads back, errors bounded per format,
Numba and NumPy equal to the byte.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.quantise.blocks import (
    BLOCK_TYPES,
    CHUNK_WEIGHTS,
    LARGEST,
    _quantiser,
    quantise_rows,
    with_numpy,
)

F = np.float32
TYPES = sorted(BLOCK_TYPES)
# Root of mean squared error, relative to that of normally distributed weights; measured 0.00536,
# 0.0808, 0.0703, 0.0166, 0.1113.
GAUSSIAN_ERROR = {"Q8_0": 0.0055, "Q4_0": 0.082, "Q4_K": 0.0713, "Q6_K": 0.0171, "MXFP4": 0.1135}
# Largest error of any weight, relative to its block's peak: half a step, and what clipping and
# stored scales add.
WORST_ERROR = {"Q8_0": 0.0042, "Q4_0": 0.18, "Q4_K": 0.16, "Q6_K": 0.045, "MXFP4": 0.26}


def decode(blocks: np.ndarray, name: str) -> np.ndarray:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[name]).astype(F)


def distributions(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (35, 512)  # 70 blocks of 256: a last group of lanes that is not full
    outliers = rng.standard_normal(shape) * 0.02
    outliers[:, ::97] *= 20
    outliers[::10] *= 30
    table = {
        "gaussian": rng.standard_normal(shape) * 0.02,
        "laplace": rng.laplace(size=shape) * 0.02,
        "student": rng.standard_t(4, size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "positive": rng.uniform(0.5, 1, shape),
        "negative": rng.uniform(-1, -0.5, shape),
        "outliers": outliers,
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.02),
        "tiny": rng.standard_normal(shape) * 3e-6,
        "below half precision": rng.standard_normal(shape) * 2e-8,
        "denormal": rng.standard_normal(shape) * 1e-40,
        "huge": rng.uniform(-LARGEST, LARGEST, shape),
        "steps": rng.integers(-8, 8, shape) * 0.25,
    }
    return {name: w.astype(F) for name, w in table.items()}


@pytest.mark.parametrize("name", TYPES)
def test_numba_and_numpy_give_the_same_bytes(name: str) -> None:
    kind = BLOCK_TYPES[name]
    for label, w in distributions(7).items():
        expected = np.empty((w.size // kind.block, kind.block_bytes), np.uint8)
        with_numpy(name, w.reshape(-1, kind.block), expected)
        got = quantise_rows(w, name).reshape(expected.shape)
        np.testing.assert_array_equal(got, expected, err_msg=f"{label}, seed 7")


def test_without_numba_numpy_quantises(monkeypatch: pytest.MonkeyPatch) -> None:
    w = distributions(1)["gaussian"]
    expected = quantise_rows(w, "Q4_K")
    _quantiser.cache_clear()

    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", refuse)
    got = quantise_rows(w, "Q4_K")
    _quantiser.cache_clear()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", TYPES)
def test_error_on_gaussian_weights(name: str) -> None:
    w = np.random.default_rng(3).standard_normal((64, 1024)).astype(F)
    error = np.sqrt(np.mean((decode(quantise_rows(w, name), name) - w) ** 2, dtype=np.float64))
    assert GAUSSIAN_ERROR[name] * 0.95 < error < GAUSSIAN_ERROR[name]


@pytest.mark.parametrize("name", TYPES)
def test_no_weight_is_far_off(name: str) -> None:
    kind = BLOCK_TYPES[name]
    for label, w in distributions(11).items():
        blocks = w.reshape(-1, kind.block)
        got = decode(quantise_rows(w, name), name).reshape(blocks.shape)
        assert np.isfinite(got).all(), label
        peak = np.abs(blocks).max(axis=1, keepdims=True)
        # Half precision's smallest step, by the largest code of a group, where scales are that
        # small.
        bound = WORST_ERROR[name] * peak + (0 if name == "MXFP4" else 2.0**-24 * 16)
        worst = float((np.abs(got - blocks) - bound).max())
        assert worst <= 1e-30, f"{label}: {worst}"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(-45, 18),
)
def test_property_finite_in_finite_out(
    name: str, seed: int, rows: int, blocks: int, exponent: float
) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, blocks * BLOCK_TYPES[name].block)
    w = (rng.standard_normal(shape) ** rng.integers(1, 4)).astype(F)
    w = w / max(float(np.abs(w).max()), 1.0) * F(2.0**exponent)
    w[rng.random(shape) < 0.2] = 0
    got = decode(quantise_rows(w, name), name)
    assert np.isfinite(got).all()
    slack = 0 if name == "MXFP4" else 2.0**-24 * 16
    assert np.abs(got - w).max() <= np.abs(w).max() * WORST_ERROR[name] + slack + 1e-30


@pytest.mark.parametrize("name", TYPES)
def test_zero_blocks_have_scale_zero(name: str) -> None:
    kind = BLOCK_TYPES[name]
    w = np.zeros((2, 2 * kind.block), F)
    w[1, kind.block :] = 1
    blocks = quantise_rows(w, name).reshape(-1, kind.block_bytes)
    assert not decode(blocks[:3], name).any()
    scale = {"Q6_K": slice(192, 210), "Q4_K": slice(0, 16), "MXFP4": slice(0, 1)}.get(
        name, slice(0, 2)
    )
    assert not blocks[:3, scale].any()
    assert not decode(quantise_rows(np.full((1, kind.block), -0.0, F), name), name).any()


CONSTANTS = {"Q8_0": 1e-3, "Q4_0": 6e-4, "Q4_K": 0.01, "Q6_K": 0.01, "MXFP4": 0.13}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -0.0123, 700.0])
def test_constant_rows_stay_constant(name: str, value: float) -> None:
    got = decode(quantise_rows(np.full((1, 256), value, F), name), name)
    assert (got == got[0, 0]).all()
    assert abs(got[0, 0] / value - 1) <= CONSTANTS[name]


@pytest.mark.parametrize("name", TYPES)
def test_what_was_decoded_is_found_again(name: str) -> None:
    """Weights on the format's own grid are kept, but for scales: within 1 % of the step."""
    w = decode(quantise_rows(distributions(5)["uniform"], name), name)
    again = decode(quantise_rows(w, name), name)
    limit = {"Q8_0": 1e-3, "Q4_0": 2e-3, "MXFP4": 0.0}.get(name, 0.04)
    assert np.abs(again - w).max() <= limit * np.abs(w).max()


@pytest.mark.parametrize("name", TYPES)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    w = distributions(2)["laplace"]
    whole = quantise_rows(w, name)
    for rows in (slice(0, 1), slice(3, 20), slice(34, 35)):
        np.testing.assert_array_equal(quantise_rows(w[rows], name), whole[rows])


def test_bf16_bits_and_strided_rows_are_taken() -> None:
    bits = f32_to_bf16(distributions(4)["gaussian"])
    np.testing.assert_array_equal(
        quantise_rows(bits, "q4_0"), quantise_rows(bf16_to_f32(bits), "Q4_0")
    )
    wide = np.repeat(bf16_to_f32(bits), 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(quantise_rows(wide, "Q4_0"), quantise_rows(bits, "Q4_0"))


def test_rows_longer_than_a_chunk() -> None:
    w = np.random.default_rng(0).standard_normal((2, CHUNK_WEIGHTS + 256)).astype(F)
    got = quantise_rows(w, "Q8_0")
    np.testing.assert_array_equal(got[1:], quantise_rows(w[1:], "Q8_0"))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(name: str, value: float) -> None:
    w = np.zeros((3, 512), F)
    w[2, 500] = value
    with pytest.raises(ValueError, match="weights hold NaN or inf: mend the checkpoint"):
        quantise_rows(w, name)


@pytest.mark.parametrize("name", TYPES)
def test_weights_beyond_half_precision_are_refused(name: str) -> None:
    w = np.zeros((1, 256), F)
    w[0, 0] = LARGEST
    assert np.isfinite(decode(quantise_rows(w, name), name)).all()
    w[0, 0] = np.nextafter(F(LARGEST), F(np.inf))
    with pytest.raises(ValueError, match="weights reach 2.62e.05"):
        quantise_rows(w, name)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: quantise_rows(np.zeros((2, 576), F), "Q4_K"),
            "multiple of 256, or take MXFP4, Q4_0, Q8_0",
        ),
        (
            lambda: quantise_rows(np.zeros((2, 33), F), "Q8_0"),
            "in_features=33: Q8_0 needs a multiple of 32",
        ),
        (lambda: quantise_rows(np.zeros((2, 0), F), "Q8_0"), "in_features=0"),
        (
            lambda: quantise_rows(np.zeros((2, 32), F), "Q5_K"),
            "must be one of MXFP4, Q4_0, Q4_K, Q6_K, Q8_0",
        ),
        (lambda: quantise_rows(np.zeros((2, 32)), "Q8_0"), "weights are float64"),
        (lambda: quantise_rows(np.zeros(32, F), "Q8_0"), "must be float32 or uint16"),
        (
            lambda: quantise_rows(np.zeros((2, 32), F), "Q8_0", np.empty((2, 33), np.uint8)),
            r"uint8 \(2, 34\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def block_experts(name: str, has_gate: bool = True, has_bias: bool = False) -> StoredExperts:
    """Three experts of 512 x 256, down's rows behind two that are not its own."""
    rng = np.random.default_rng(9)

    def matrix(outs: int, ins: int) -> StoredMatrix:
        w = rng.standard_normal((3 * (outs + 2), ins)).astype(F)
        blocks = quantise_rows(w, name).reshape(3, outs + 2, -1)
        return StoredMatrix.of_rows(name, ins, blocks[:, 2:])

    spec = MoESpec(3, 512, 256, "gguf", has_gate=has_gate, has_bias=has_bias)
    biases = [rng.standard_normal((3, n)).astype(F) for n in (256, 256, 512)] if has_bias else []
    gate = matrix(256, 512) if has_gate else None
    return StoredExperts(spec, gate, matrix(256, 512), matrix(512, 256), *biases)


@pytest.mark.parametrize("name", TYPES)
def test_an_expert_is_decoded_to_float32(name: str) -> None:
    experts = block_experts(name, has_bias=True)
    weights = expert_weights(experts, 1)
    for projection, matrix in experts.matrices.items():
        got = getattr(weights, projection)
        assert got.dtype == F and got.flags.c_contiguous
        np.testing.assert_array_equal(got, decode(matrix.data[1].copy(), name))
        np.testing.assert_array_equal(
            getattr(weights, f"{projection}_bias"), experts.biases[projection][1]
        )
    gateless = expert_weights(block_experts(name, has_gate=False), 2)
    assert gateless.gate is None and gateless.up_bias is None


def test_experts_that_cannot_be_decoded() -> None:
    experts = block_experts("Q8_0")
    with pytest.raises(ValueError, match="expert 3: must be 0 to 2"):
        expert_weights(experts, 3)
    for name in ("Q8_1", "Q9_X"):
        with pytest.raises(ValueError, match=f"the gguf package decodes {name}"):
            StoredMatrix.of_rows(name, 256, experts.down.data)
