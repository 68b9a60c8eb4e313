"""Rounding to levels: how near it comes, what it leaves alone, and that the kernels' numbers are
the table's.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from ktk.experts.formats import PANELS, Format
from ktk.experts.layout import MatrixLayout, matrix_layout
from ktk.experts.panels import dequantised, read_panels
from ktk.experts.rotation import Rotation, rotate
from ktk.experts.spec import MoESpec
from ktk.ops.requantise import packed_spec
from ktk.quantise import levels as rounding
from ktk.quantise.feedback import factorise
from ktk.quantise.levels import Span, numbers_of, round_levels, spans_of
from make import ROOT
from make.cases import pack_all, random_experts

F = np.float32
NL4 = PANELS["nl4"]
LEVELLED = [fmt for fmt in PANELS.values() if fmt.levels]


def nearest(values: np.ndarray, spans: tuple[Span, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest levels, and how many lie between each and 0."""
    inside, level, index = (np.zeros_like(values) for _ in range(3))
    for low, high, per, step in spans:
        wider = np.clip(values, low, high)
        steps = np.rint((wider - inside) * per)
        level, index, inside = level + steps * step, index + steps, wider
    return level, index


def ordered_sum(terms: np.ndarray) -> np.ndarray:
    return np.add.accumulate(terms, axis=-1, dtype=F)[..., -1]


def inverse_of(values: np.ndarray) -> np.ndarray:
    return np.divide(F(1), values, out=np.zeros_like(values), where=values != 0)


def oracle(w: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, ...]:
    """Codes, scales and multipliers of whole panels' rows: the kernels' operations in their
    order.
    """
    grouped, fmt = layout.multiplier_group, layout.format
    numbers = numbers_of(fmt.levels, fmt.multipliers if grouped else ())
    turned = rotate(w, layout.rotation)
    exponent = np.frexp(np.abs(turned).max(axis=1))[1]
    x = np.ldexp(turned, -exponent[:, None])
    largest = numbers.reach * numbers.magnitudes[-1]
    size = np.sqrt(ordered_sum(x * x) / F(x.shape[1])) / largest
    groups = x.reshape(len(x), -1, grouped or 32)
    high, low = (np.maximum(v.max(axis=2), F(0)) for v in (groups, -groups))
    top = np.maximum(high, low)
    sign = np.where(high > low, numbers.lean, -numbers.lean) if grouped else np.ones_like(top)

    def loss_of(step: np.ndarray) -> np.ndarray:
        values = groups * inverse_of(step)[..., None]
        rest = values - nearest(values, numbers.level_spans)[0]
        return ordered_sum(rest * rest) * (step * step)

    def wanted(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        per = inverse_of(scale * numbers.reach)[:, None]
        return nearest(top * per, numbers.magnitude_spans)

    least, best = np.full(len(x), np.inf, F), np.zeros(len(x), F)
    is_open = np.ones(len(x), bool)
    core = rounding.LADDER if grouped else rounding.CHANNEL_LADDER
    for i, rung in enumerate(core + rounding.TAIL):
        scale = size * F(rung)
        loss = ordered_sum(loss_of(scale[:, None] * (wanted(scale)[0] * sign)))
        better = is_open & (loss < least)
        least, best = np.where(better, loss, least), np.where(better, scale, best)
        is_open = better | (i < len(core))
    at = wanted(best)[1].astype(int) + numbers.origin[0]
    least, chosen = np.full(top.shape, np.inf, F), np.zeros(top.shape, F)
    for away, turn in numbers.tries:
        place = np.clip(at + away, 0, len(numbers.magnitudes) - 1)
        multiplier = numbers.magnitudes[place] * sign * F(turn)
        loss = loss_of(best[:, None] * multiplier)
        chosen = np.where(loss < least, multiplier, chosen)
        least = np.minimum(loss, least)
    values = groups * inverse_of(best[:, None] * chosen)[..., None]
    codes = nearest(values, numbers.level_spans)[1] + numbers.origin[1]
    place = np.searchsorted(numbers.magnitudes, np.abs(chosen))
    index = place + len(numbers.magnitudes) * (chosen < 0)
    return codes.reshape(x.shape), np.ldexp(best, exponent), index


@pytest.mark.parametrize("rotation", [Rotation(), Rotation(64, 5), Rotation(256)])
@pytest.mark.parametrize("group", [16, 32, 0])
@pytest.mark.parametrize("fmt", LEVELLED, ids=lambda fmt: fmt.name)
def test_codes_are_the_oracles_on_every_machine(
    fmt: Format, group: int, rotation: Rotation
) -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_t(3, (80, 512)).astype(F)  # some channels want the ladder's tail
    w[::7] = rng.standard_normal(w[::7].shape) * rng.lognormal(0, 2, (len(w[::7]), 1))
    w[3] = 0
    w[4, 1:] = 0
    layout = matrix_layout(fmt, 512, 80, group, 128, rotation)
    got = round_levels(w, layout)
    codes, scales, multipliers = oracle(w, layout)
    np.testing.assert_array_equal(codes, got.codes)
    np.testing.assert_array_equal(scales, got.scales)
    if group:
        np.testing.assert_array_equal(multipliers, got.multipliers)
        assert len(np.unique(multipliers)) == len(fmt.multipliers)


@pytest.mark.parametrize(
    "levels",
    [*(fmt.levels for fmt in LEVELLED), (-9, -3, 0, 1, 2, 4), (0, 1, 4), (5, 6, 8), (3,)],
)
def test_spans_lead_to_the_nearest_level(levels: tuple[int, ...]) -> None:
    values = np.random.default_rng(6).uniform(-12, 12, 4000).astype(F)
    level, _ = nearest(values, spans_of(levels))
    distance = np.abs(values[:, None] - np.array(levels, F))
    np.testing.assert_array_equal(np.array(levels)[distance.argmin(axis=1)], level)


def relative_error(w: np.ndarray, group: int, rotation: Rotation, fmt: Format = NL4) -> float:
    layout = matrix_layout(fmt, w.shape[1], len(w), group, 128, rotation)
    got = dequantised(round_levels(w, layout).panels(layout), layout)
    return float(np.square(w - got).sum() / np.square(w).sum())


@pytest.mark.parametrize(("group", "most"), [(16, 0.0050), (32, 0.0063), (0, 0.0101)])
@pytest.mark.parametrize("rotation", [Rotation(), Rotation(64), Rotation(256, 3)])
def test_error_of_normal_weights(group: int, most: float, rotation: Rotation) -> None:
    w = np.random.default_rng(0).standard_normal((64, 1024)).astype(F)
    assert relative_error(w, group, rotation) < most


def test_rotation_takes_outliers_apart() -> None:
    w = np.random.default_rng(1).standard_normal((32, 512)).astype(F)
    w[:, ::61] *= 30
    assert relative_error(w, 0, Rotation(64)) < relative_error(w, 0, Rotation()) / 1.5


@pytest.mark.parametrize("group", [16, 32, 0])
def test_zeros_stay_zeros_and_padding_adds_nothing(group: int) -> None:
    w = np.random.default_rng(2).standard_normal((5, 70)).astype(F)
    w[1] = 0
    layout = matrix_layout(NL4, 70, 5, group, 128)
    codes, scales = read_panels(round_levels(w, layout).panels(layout), layout)
    assert (codes[:, 70:] == NL4.zero_point).all() and (codes[5:] == NL4.zero_point).all()
    assert (codes[1] == NL4.zero_point).all() and scales[1] == 0


def test_sizes_of_any_order_give_the_same_codes() -> None:
    w = np.random.default_rng(3).standard_normal((16, 256)).astype(F)
    layout = matrix_layout(NL4, 256, 16, 16, 128)
    want = round_levels(w, layout)
    for size in (2.0**-100, 2.0**-60, 2.0**60, 2.0**100):
        got = round_levels(w * F(size), layout)
        np.testing.assert_array_equal(want.codes, got.codes)
        np.testing.assert_allclose(got.scales, want.scales * F(size), rtol=1e-6)


def test_feedback_lowers_the_loss_of_rotated_columns() -> None:
    rng = np.random.default_rng(4)
    mixing = rng.standard_normal((256, 256)) * rng.lognormal(0, 1, 256)
    h = mixing @ mixing.T / 256
    w = rng.standard_normal((32, 256)).astype(F)
    factor = factorise(h)
    layout = matrix_layout(NL4, 256, 32, 16, 128)

    def loss(levelled: rounding.Levelled) -> float:
        e = (w - dequantised(levelled.panels(layout), layout)).astype(np.float64)
        return float(np.einsum("ij,jk,ik->", e, h, e))

    plain = round_levels(w, layout)
    handed_on = round_levels(w, layout, factor.upper, factor.weight)
    assert loss(handed_on) < 0.6 * loss(plain)


@pytest.mark.parametrize("fmt", LEVELLED, ids=lambda fmt: fmt.name)
def test_the_kernels_have_the_tables_numbers(fmt: Format) -> None:
    text = (ROOT / "ktk/_cy/include/ktk_levels.h").read_text()
    (row,) = re.findall(
        rf"\[{fmt.bits}\] = {{{{(.*?)}},\n *KTK_MULTIPLIERS\((.*?)\)", text, re.DOTALL
    )
    levels = tuple(map(int, re.findall(r"-?\d+", row[0].replace("LEVELS_4", ""))))
    half = tuple(map(int, re.findall(r"\d+", row[1])))
    (zero,) = re.findall(r"KTK_LEVEL_ZERO = (\d+)", text)
    assert levels == fmt.levels * (16 >> fmt.bits) and 0 in levels
    assert fmt.levels == tuple(sorted(fmt.levels))
    assert (*half, *(-n for n in half)) == fmt.multipliers
    # What the kernels' sums of 16 bits, and products of 8, stand on.
    assert max(abs(n) for n in levels) <= int(zero)
    assert max(abs(n) for n in levels) * max(fmt.multipliers) <= 127


def test_gguf_experts_packed_as_nl4_are_rotated() -> None:
    spec = MoESpec(2, 64, 64, "int8")
    experts = pack_all(spec, random_experts(spec, 1))
    assert packed_spec(experts, "nl4").turns == (64, 0)
    assert packed_spec(experts, "int4").turns == (0, 0)
