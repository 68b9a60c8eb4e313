"""Rounding with error feedback: against a textbook GPTQ, what it gains in every format,
and inputs that say little.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from ktk.experts.activation import Activation
from ktk.experts.formats import BLOCKS, PANELS, Grid
from ktk.experts.layout import matrix_layout
from ktk.experts.panels import read_panels
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.quantise import feedback as calibrate
from ktk.quantise.blocks import BLOCK_TYPES, quantise_rows
from ktk.quantise.feedback import (
    LayerCalibration,
    LayerInputs,
    calibrated,
    factorise,
    packed_encoder,
    round_matrix,
)
from ktk.quantise.pack import pack_matrix

F = np.float32
GRIDS = [row.name for row in BLOCKS.values() if row.grid is not None]
PACKED = [(f.name, g) for f in PANELS.values() if f.is_integer for g in f.group_sizes]


def correlated_inputs(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    mix = rng.standard_normal((columns, columns)) * np.geomspace(1, 0.05, columns)
    return (rng.standard_normal((tokens, columns)) @ mix + 0.5).astype(F)


def weights(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((rows, columns)) * 0.02).astype(F)


def textbook(w: np.ndarray, h: np.ndarray, scales: np.ndarray, low: int, high: int) -> np.ndarray:
    """GPTQ as its paper has it, in float64: the inverse's Cholesky factor, one column after the
    other.

    scales : (rows, columns), each column's.
    """
    w = w.astype(np.float64)
    inverse = np.linalg.cholesky(np.linalg.inv(h)).T  # upper
    codes = np.empty(w.shape)
    for k in range(w.shape[1]):
        codes[:, k] = np.clip(np.rint(w[:, k] / scales[:, k]), low, high)
        error = (w[:, k] - codes[:, k] * scales[:, k]) / inverse[k, k]
        w[:, k:] -= error[:, None] * inverse[k, k:]
    return codes


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "group"), [(96, 32), (320, 32), (320, 320)])
def test_codes_are_those_of_a_textbook_gptq(columns: int, group: int) -> None:
    rng = np.random.default_rng(3)
    x, w = correlated_inputs(rng, 2000, columns).astype(np.float64), weights(rng, 40, columns)
    h = x.T @ x / len(x)
    damped = h + calibrate.DAMPING * np.diag(h).mean() * np.eye(columns)
    found = round_matrix(w, factorise(h), Grid(group, (6.0, 7.0, 8.0), -8, 7))
    scales = found.scales.T.repeat(group, axis=1)
    expected = textbook(w, damped, scales, -8, 7)
    # the kernel computes in float32: a weight on the edge between two codes may fall to the other
    # side, and its row changes
    same = (expected == found.codes.T).all(axis=1)
    assert same.mean() > 0.9
    e = w - expected * scales
    np.testing.assert_allclose(found.error[:, same], e[same].T, atol=1e-6)
    loss = np.einsum("ij,jk,ik->i", e, damped, e)
    unit = (
        np.linalg.cholesky(damped[::-1, ::-1]).diagonal() ** 2
    )  # the loss is in units of its mean
    np.testing.assert_allclose(found.loss[same] * unit.mean(), loss[same], rtol=1e-3)
    plain = np.clip(np.rint(w / scales), -8, 7)
    assert (plain == expected).mean() < 0.9  # else the comparison would say nothing


def h_loss(error: np.ndarray, h: np.ndarray) -> float:
    e = error.astype(np.float64)
    return float(np.einsum("ij,jk,ik->", e, h, e))


def decoded_packed(panels: np.ndarray, spec: MoESpec, rows: int, columns: int) -> np.ndarray:
    fmt = spec.format
    layout = matrix_layout(fmt, columns, rows, spec.group_size or 0, 128)
    codes, scales = read_panels(panels, layout)
    wide = np.repeat(scales, layout.group_size, axis=1)[:, :columns]
    return ((codes[:, :columns].astype(F) - fmt.zero_point) * wide)[:rows]


@pytest.mark.parametrize("kind", GRIDS)
def test_feedback_lowers_the_loss_of_ggml_blocks(kind: str) -> None:
    rng = np.random.default_rng(0)
    x, w = correlated_inputs(rng, 2048, 512), weights(rng, 70, 512)
    h = (x.T @ x / len(x)).astype(np.float64)
    blocks, values = calibrated(w, BLOCKS[kind], factorise(h))
    decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(decoded, values, atol=1e-6)
    nothing = factorise(np.zeros((512, 512)))
    alike = gguf.dequantize(
        calibrated(w, BLOCKS[kind], nothing)[0], gguf.GGMLQuantizationType[kind]
    )
    assert h_loss(w - decoded, h) < 0.4 * h_loss(w - alike, h)
    if kind in BLOCK_TYPES:  # without inputs as good as the plain quantiser
        plain = gguf.dequantize(quantise_rows(w, kind), gguf.GGMLQuantizationType[kind])
        assert np.square(w - alike).sum() < 1.03 * np.square(w - plain).sum()


@pytest.mark.parametrize(("name", "group"), PACKED)
def test_feedback_lowers_the_loss_of_packed_formats(name: str, group: int) -> None:
    rng = np.random.default_rng(1)
    rows, columns = 37, 288  # neither whole panels nor whole groups of 128
    x, w = correlated_inputs(rng, 2048, columns), weights(rng, rows, columns)
    h = (x.T @ x / len(x)).astype(np.float64)
    spec = MoESpec(1, columns, rows, name, group, rotation=0)
    layout, fmt = spec.layout.gate_up, spec.format
    panels, values = calibrated(w, fmt, factorise(h), group)
    decoded = decoded_packed(panels, spec, rows, columns)
    np.testing.assert_allclose(decoded, values, atol=1e-6)
    pack_matrix(w, layout, panels)
    plain = decoded_packed(panels, spec, rows, columns)
    share = 0.45 if fmt.bits == 2 else 0.4  # four levels leave less to hand on
    assert h_loss(w - decoded, h) < share * h_loss(w - plain, h)


def test_channels_that_never_fire_and_single_tokens_leave_finite_blocks() -> None:
    rng = np.random.default_rng(2)
    w = weights(rng, 5, 256)
    for tokens in (0, 1, 3):
        x = rng.standard_normal((tokens, 256)).astype(F)
        x[:, ::3] = 0
        h = x.T @ x / max(tokens, 1)
        for kind in GRIDS:
            values = calibrated(w, BLOCKS[kind], factorise(h))[1]
            assert np.isfinite(values).all()
            assert np.abs(w - values).max() < 0.05, kind


def test_a_zero_row_stays_zero() -> None:
    w = weights(np.random.default_rng(4), 3, 256)
    w[1] = 0
    for kind in GRIDS:
        values = calibrated(w, BLOCKS[kind], factorise(np.eye(256) + 0.5))[1]
        assert not values[1].any(), kind


def test_moments_that_are_not_positive_definite_are_damped_more() -> None:
    h = np.full((8, 8), 1.0)
    h[0, 1] = h[1, 0] = 1.5  # negative eigenvalue
    factor = factorise(h)
    assert np.isfinite(factor.upper).all()
    assert (factor.weight > 0).all()


def test_nan_is_refused() -> None:
    w = weights(np.random.default_rng(5), 2, 256)
    h = np.eye(256)
    h[3, 3] = np.nan
    with pytest.raises(ValueError, match="calibration hold NaN"):
        factorise(h)
    w[0, 0] = np.inf
    with pytest.raises(ValueError, match="NaN or inf"):
        calibrated(w, BLOCKS["Q8_0"], factorise(np.eye(256)))
    inputs = LayerInputs(
        np.full((2, 32), np.nan, F), np.zeros((2, 1), np.int64), np.ones((2, 1), F)
    )
    with pytest.raises(ValueError, match="calibration hold NaN"):
        LayerCalibration(MoESpec(1, 32, 32), inputs)


def layer(rng: np.random.Generator, spec: MoESpec) -> tuple[list[ExpertWeights], LayerInputs]:
    i, h = spec.intermediate_size, spec.hidden_size
    experts = [
        ExpertWeights(weights(rng, i, h), weights(rng, i, h), weights(rng, h, i))
        for _ in range(spec.num_experts)
    ]
    ids = rng.integers(0, spec.num_experts - 1, (300, 2))  # the last expert gets no token
    routing = rng.random((300, 2)).astype(F)
    return experts, LayerInputs(correlated_inputs(rng, 300, h), ids, routing)


def test_a_layer_is_the_same_on_any_number_of_threads() -> None:
    spec = MoESpec(5, 96, 64, "int4", 32)
    experts, inputs = layer(np.random.default_rng(6), spec)
    calibration, encode = LayerCalibration(spec, inputs), packed_encoder(spec)
    found = []
    for threads in (1, 4):
        with ThreadPoolExecutor(threads) as pool:
            found.append(
                list(pool.map(lambda e: calibration.expert(e, experts[e], encode), range(5)))
            )
    for one, other in zip(*found, strict=True):
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(one[name], other[name])


def test_calibration_brings_the_layer_closer_to_its_float_output() -> None:
    spec = MoESpec(4, 96, 64, "int4", 32)
    experts, inputs = layer(np.random.default_rng(7), spec)

    def silu_mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        g = x @ gate.T
        return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T

    def error(stored: dict[str, np.ndarray], e: int) -> float:
        token, slot = np.nonzero(inputs.topk_ids == e)
        x = inputs.hidden[token].astype(np.float64)
        shapes = {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}
        decoded = [decoded_packed(stored[n], spec, *shapes[n]) for n in ("gate", "up", "down")]
        true = silu_mlp(x, experts[e].gate, experts[e].up, experts[e].down)
        return float(
            np.square((silu_mlp(x, *decoded) - true) * inputs.topk_weights[token, slot, None]).sum()
        )

    calibration, encode = LayerCalibration(spec, inputs), packed_encoder(spec)
    silent = LayerInputs(inputs.hidden[:0], inputs.topk_ids[:0], inputs.topk_weights[:0])
    plain = LayerCalibration(spec, silent)
    for e in range(3):
        gained = error(calibration.expert(e, experts[e], encode), e)
        assert gained < 0.6 * error(plain.expert(e, experts[e], encode), e)


def test_the_size_of_channels_moves_from_down_to_up() -> None:
    rng = np.random.default_rng(9)
    spec = MoESpec(2, 96, 64, "int4", 32)
    experts, inputs = layer(rng, spec)
    # large inputs with small weights, as trained models have
    sizes = np.where(np.arange(64) % 8 < 2, F(30), F(1))
    expert = experts[0]
    expert = expert._replace(up=expert.up * sizes[:, None], down=expert.down / sizes)
    never = Activation(up_min=-1e30, up_max=1e30)  # never reached
    bounded = dataclasses.replace(spec, activation=never)
    balanced, plain = (
        LayerCalibration(s, inputs).expert(0, expert, packed_encoder(s)) for s in (spec, bounded)
    )
    np.testing.assert_array_equal(balanced["gate"], plain["gate"])
    up, plain_up = (decoded_packed(stored["up"], spec, 64, 96) for stored in (balanced, plain))
    scales = np.abs(plain_up).max(axis=1) / np.abs(up).max(axis=1)
    np.testing.assert_array_equal(up * scales[:, None], plain_up)  # the codes are the same
    assert scales.max() / scales.min() >= 4
    token = np.nonzero(inputs.topk_ids == 0)[0]
    x = inputs.hidden[token]
    gate = x @ decoded_packed(plain["gate"], spec, 64, 96).T
    h = gate / (1 + np.exp(-gate)) * (x @ plain_up.T)
    true = h @ expert.down.T

    def error(stored: dict[str, np.ndarray], h: np.ndarray) -> float:
        return float(np.square(h @ decoded_packed(stored["down"], spec, 96, 64).T - true).sum())

    assert error(balanced, h / scales) < 0.7 * error(plain, h)


def test_an_expert_without_tokens_takes_the_layers_moments() -> None:
    spec = MoESpec(3, 96, 64, "int4", 32)
    experts, inputs = layer(np.random.default_rng(8), spec)
    stored = LayerCalibration(spec, inputs).expert(2, experts[2], packed_encoder(spec))
    x = inputs.hidden
    pooled = factorise(x.T @ x / len(x))
    expected = calibrated(experts[2].gate, spec.format, pooled, spec.group_size or 0)[0]
    np.testing.assert_array_equal(stored["gate"], expected)
    plain = factorise(np.zeros((64, 64)))
    expected = calibrated(experts[2].down, spec.format, plain, spec.group_size or 0)[0]
    np.testing.assert_array_equal(stored["down"], expected)
