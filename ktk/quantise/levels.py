"""Round weights to scale * multiplier * level: formats whose channels alone have scales.

A channel's scale is the one of a ladder, in root mean squares of the channel, of least error; then
each group takes the multiplier of least loss, columns rounded in order with the errors before them
handed on (``ktk.quantise.feedback``) where moments of inputs are known. Where they are not, every
machine finds the same bytes.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ktk.experts.layout import PANEL, MatrixLayout
from ktk.experts.panels import lay_panels
from ktk.experts.rotation import signs

F = np.float32
# The largest product, in root mean squares of a channel, of channels with multipliers and without.
LADDER = (3.0, 3.12, 3.25, 3.4, 3.55, 3.7, 3.85, 4.0)
CHANNEL_LADDER = (2.2, 2.32, 2.45, 2.58, 2.72, 2.87, 3.03, 3.2)
# Then these, while each is better: channels with outliers that no rotation has spread.
TAIL = (4.5, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0, 17.0, 22.0, 28.0, 36.0, 46.0, 60.0, 80.0)
# How far from the magnitude that a group's largest value wants, and whether with the sign it wants.
# Without any one of them the error of normal weights grows, by 0.1 to 10 %.
TRIES = ((0, 1), (1, 1), (-1, 1), (2, 1), (3, 1), (0, -1), (1, -1), (2, -1), (3, -1), (4, -1))
_COLUMNS = 128  # rounded between two products with the rest of the factor
_ALONE = 32  # columns rounded at a time where a channel has no groups
NO_NUMBA = (
    "levels and calibration are rounded by numba, which cannot be imported: pip install numba"
)


class Levelled(NamedTuple):
    """codes uint8 (rows, padded_in), scales float32 (rows,), multipliers uint8 (rows, groups) or
    None.
    """

    codes: np.ndarray
    scales: np.ndarray
    multipliers: np.ndarray | None

    def panels(self, layout: MatrixLayout) -> np.ndarray:
        """uint8 (num_panels, panel_bytes)."""
        return lay_panels(self.codes, self.scales[:, None], layout, self.multipliers)


@cache
def _compiled() -> Any:
    """The kernels of Numba; RuntimeError without it."""
    try:
        return importlib.import_module("ktk.quantise._levels_numba")
    except ImportError as error:
        raise RuntimeError(NO_NUMBA) from error


# float32 (low, high, 1 / step, step).
Span = tuple[np.float32, np.float32, np.float32, np.float32]


class Numbers(NamedTuple):
    """What the kernels know of a format. magnitudes float32, ascending; spans of them and of the
    levels; origin: the indices that 0 has, or would have, among both. reach: the largest level.
    lean : 1 or -1, the side where levels reach further; 0: multipliers have no signs. tries int32
    (n, 2), of TRIES.
    """

    magnitudes: np.ndarray
    magnitude_spans: tuple[Span, ...]
    level_spans: tuple[Span, ...]
    origin: tuple[int, int]
    reach: np.float32
    lean: np.float32
    tries: np.ndarray


@cache
def numbers_of(levels: tuple[int, ...], multipliers: tuple[int, ...]) -> Numbers:
    """Of ascending levels, 0 among them, and of magnitudes, ascending, before their negatives; no
    multipliers: all are 1.
    """
    half = len(multipliers) // 2
    magnitudes = multipliers[:half] or (1,)
    assert tuple(-m for m in multipliers[:half]) == multipliers[half:]
    lean = 1 if levels[-1] > -levels[0] else -1
    first = spans_of(magnitudes)[0]
    return Numbers(
        np.array(magnitudes, F),
        spans_of(magnitudes),
        spans_of(levels),
        (-round(first[0] * first[2]), levels.index(0)),
        F(max(map(abs, levels))),
        F(lean if multipliers else 0),
        np.array(TRIES if multipliers else TRIES[:1], np.int32),
    )


def spans_of(values: tuple[int, ...]) -> tuple[Span, ...]:
    """Ascending integers as spans, from the one around 0 (the first integer, if that is above)
    outwards, each as far as its step is that between the integers on both sides.
    """
    low = high = values.index(0) if 0 in values else 0
    gaps = np.diff(values).tolist()
    spans: list[Span] = []
    while low > 0 or high < len(gaps):
        step = min(gaps[max(low - 1, 0) : low] + gaps[high : high + 1])
        while low > 0 and gaps[low - 1] == step:
            low -= 1
        while high < len(gaps) and gaps[high] == step:
            high += 1
        spans.append((F(values[low]), F(values[high]), F(1 / step), F(step)))
    spans = spans or [(F(values[0]), F(values[0]), F(1), F(1))]
    assert spans[0][0] % spans[0][3] == 0, "the innermost step must divide the integers in it"
    return tuple(spans)


def round_levels(
    w: np.ndarray,
    layout: MatrixLayout,
    upper: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> Levelled:
    """Round float32 (out, in), finite, rotated first as the layout says; ValueError if that
    overflows.

    upper, weight : of ``ktk.quantise.feedback.Factor``, of the rotated columns, (padded_in,
    padded_in) and (padded_in,); None: no errors are handed on, and all columns count alike.
    """
    kernels, fmt, columns = _compiled(), layout.format, layout.padded_in
    rows, group = layout.num_panels * PANEL, layout.multiplier_group
    numbers = numbers_of(fmt.levels, fmt.multipliers if group else ())
    x, exponent = _columns(w, layout)
    count = np.ones(columns, F) if weight is None else weight
    scales = np.zeros(x.shape[1], F)
    kernels.channel_scales(
        x,
        count,
        group or _ALONE,
        np.array((LADDER if group else CHANNEL_LADDER) + TAIL, F),
        len(LADDER if group else CHANNEL_LADDER),
        numbers.reach,
        numbers.lean,
        numbers.magnitude_spans,
        numbers.level_spans,
        scales,
    )
    codes = np.empty(x.shape, np.uint8)
    chosen = np.empty((columns // (group or _ALONE), x.shape[1]), np.uint8)
    step = columns if upper is None else _COLUMNS
    target, error = (x, x) if upper is None else (x.copy(), np.empty((step, x.shape[1]), F))
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        here = slice(start, stop)
        u = np.empty((0, 0), F) if upper is None else np.ascontiguousarray(upper[here, here])
        kernels.round_levels(
            x,
            target,
            u,
            count,
            start,
            stop,
            group or _ALONE,
            scales,
            numbers.magnitudes,
            numbers.reach,
            numbers.lean,
            numbers.magnitude_spans,
            numbers.level_spans,
            numbers.origin,
            numbers.tries,
            codes,
            chosen,
            error,
        )
        if upper is not None and stop < columns:
            target[stop:] += upper[here, stop:].T @ error[: stop - start]
    return Levelled(
        np.ascontiguousarray(codes[:, :rows].T),
        np.ldexp(scales, exponent)[:rows],
        np.ascontiguousarray(chosen[:, :rows].T) if group else None,
    )


def _columns(w: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, np.ndarray]:
    """Weights (out, in) as columns, rotated, each row of about 1: float32 (padded_in, rows), rows a
    multiple of LANES; and the power of two of each row, int (rows,).
    """
    kernels, columns = _compiled(), layout.padded_in
    rows = layout.num_panels * PANEL
    whole = np.zeros((-(-rows // kernels.LANES) * kernels.LANES, columns), F)
    whole[: len(w), : w.shape[1]] = w
    x = np.empty(whole.shape[::-1], F)
    width = layout.rotation.width
    turn = signs(layout.rotation, columns) if width else np.ones(columns, F)
    kernels.turned_columns(whole, turn, width or 1, x)
    if not np.isfinite(x).all():
        raise ValueError("weights are so large that rotating them overflows: mend the checkpoint")
    # By a power of two, which rounds nothing: squares must not over- or underflow.
    _, exponent = np.frexp(np.abs(x).max(axis=0))
    exponent = np.maximum(exponent, -126)  # whose inverse is a number, too
    x *= np.ldexp(F(1), -exponent)
    return x, exponent
