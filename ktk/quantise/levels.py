"""Round weights to scale * multiplier * level: formats whose channels alone have scales.

A channel's scale is the one of a ladder, in root mean squares of the channel, of least error; then
each group takes the multiplier of least loss, columns rounded in order with the errors before them
handed on (``ktk.quantise.feedback``) where moments of inputs are known.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ktk.experts.layout import PANEL, MatrixLayout
from ktk.experts.panels import lay_panels
from ktk.experts.rotation import rotate

F = np.float32
# The largest product, in root mean squares of a channel. A Gaussian's best lies in the middle; a
# channel with outliers that no rotation has spread wants the last.
LADDER = (2.3, 2.6, 2.9, 3.2, 3.6, 4.5, 7.0, 10.0)
_GROUPS_TRIED = 64  # of a channel, for its scale: of fewer the best is often chance
_COLUMNS = 128  # rounded between two products with the rest of the factor
_ALONE = 32  # columns rounded at a time where a channel has no groups
NO_NUMBA = (
    "levels and calibration are rounded by numba, which cannot be imported: pip install numba"
)


class Levelled(NamedTuple):
    """codes uint8 (rows, padded_in), scales float32 (rows,), multipliers uint8 (rows, groups) or
    None; error : float32 (rows, padded_in), weight minus value.
    """

    codes: np.ndarray
    scales: np.ndarray
    multipliers: np.ndarray | None
    error: np.ndarray

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
    kernels, fmt = _compiled(), layout.format
    lanes, columns = kernels.LANES, layout.padded_in
    rows = layout.num_panels * PANEL
    whole = np.zeros((-(-rows // lanes) * lanes, columns), F)
    whole[: len(w), : w.shape[1]] = w
    whole = rotate(whole, layout.rotation)
    if not np.isfinite(whole).all():
        raise ValueError("weights are so large that rotating them overflows: mend the checkpoint")
    # Of about 1, by a power of two, which rounds nothing: squares must not over- or underflow.
    _, exponent = np.frexp(np.abs(whole).max(axis=1))
    x = np.ascontiguousarray(np.ldexp(whole, -exponent[:, None]).T)
    count = np.ones(columns, F) if weight is None else weight
    group = layout.multiplier_group
    magnitudes, signs = _parts(fmt.multipliers) if group else (np.ones(1, F), np.ones(1, F))
    table = np.array(fmt.levels, F)
    scales = _scales(x, count, group or _ALONE, magnitudes, signs, table)
    target, error = x.copy(), np.empty_like(x)
    codes, loss = np.empty(x.shape, np.int16), np.zeros(x.shape[1], F)
    chosen = np.zeros((columns // (group or _ALONE), x.shape[1]), np.uint8)
    zeros = np.zeros((_COLUMNS, _COLUMNS), F)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        here = slice(start, stop)
        groups = slice(start // (group or _ALONE), stop // (group or _ALONE))
        u = zeros if upper is None else np.ascontiguousarray(upper[here, here])
        kernels.round_levels(
            x[here],
            target[here],
            u,
            count[here],
            group or _ALONE,
            scales,
            magnitudes,
            signs,
            table,
            codes[here],
            chosen[groups],
            error[here],
            loss,
        )
        if upper is not None and stop < columns:
            target[stop:] += upper[here, stop:].T @ error[here]
    return Levelled(
        np.ascontiguousarray(codes.T[:rows].astype(np.uint8)),
        np.ldexp(scales, exponent)[:rows],
        np.ascontiguousarray(chosen.T[:rows]) if group else None,
        np.ldexp(error, exponent).T[:rows].copy(),
    )


def _parts(multipliers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ascending magnitudes and the two signs: all of them stand with the first, then with the
    second.
    """
    half = len(multipliers) // 2
    magnitudes = np.array(multipliers[:half], F)
    assert tuple(-m for m in multipliers[:half]) == multipliers[half:]
    return magnitudes, np.array([1, -1], F)


def _scales(
    x: np.ndarray,
    weight: np.ndarray,
    group: int,
    magnitudes: np.ndarray,
    signs: np.ndarray,
    table: np.ndarray,
) -> np.ndarray:
    """float32 (rows,) of least error over LADDER; x (K, rows)."""
    kernels = _compiled()
    largest = float(magnitudes.max() * np.abs(table).max())
    size = np.sqrt(np.square(x, dtype=np.float64).mean(axis=0)).astype(F) / F(largest)
    best, least = np.zeros_like(size), np.full_like(size, np.inf)
    stride = max(1, len(x) // group // _GROUPS_TRIED)
    loss = np.empty(kernels.LANES, F)
    for row in range(0, x.shape[1], kernels.LANES):
        here = slice(row, row + kernels.LANES)
        mine = np.ascontiguousarray(x[:, here])
        for step in LADDER:
            scale = size[here] * F(step)
            kernels.levels_loss(mine, weight, group, stride, scale, magnitudes, signs, table, loss)
            better = loss < least[here]
            best[here] = np.where(better, scale, best[here])
            least[here] = np.where(better, loss, least[here])
    return best
