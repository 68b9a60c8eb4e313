"""Round weights with error feedback (GPTQ): packed formats and ggml blocks, better where the experts' inputs are.

The loss of a row is e H e^T: e its rounding errors, H = X^T X / n the second moments of the inputs X of a calibration text. With
H = (I + U) D (I + U)^T, U strictly upper triangular and D diagonal, it is the sum over columns k of D_k (t_k - q_k)^2, where
t_k = w_k + sum over j < k of e_j U_jk: columns are rounded in order, each towards its weight plus what the errors before it hand on
(Frantar et al., GPTQ, 2022, in the form of Chee et al., QuIP, 2023, which needs one Cholesky factorisation and no inverse).

Scales come with their group: every candidate of a ladder is tried with the feedback inside the group counted, then the scale of
least loss for the best codes, then, where scales are stored as integers of a block's scale, the integers around it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ktk.formats import get_format
from ktk.formats.floats import to_f32
from ktk.ggml_quantise import BLOCK_TYPES, LARGEST
from ktk.layout import PANEL, MatrixLayout
from ktk.pack import NOT_FINITE, check_expert
from ktk.reference import blocks as oracle
from ktk.reference.pack import lay_panels, search_ladder
from ktk.types import Activation, ExpertWeights, MoESpec

F = np.float32
# Of H's mean diagonal, added to the diagonal: the text is a sample.
DAMPING = 0.01
# An expert's moments count as one of (its tokens + PRIOR * in_features), the layer's the rest.
PRIOR = 0.25
_COLUMNS = 128  # rounded between two products with the rest of U
_NOT, _BF16, _FP16, _POWER_OF_TWO = range(4)  # as in _calibrate_numba
_E2M1 = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)  # doubled, as ggml has them
_NO_TABLE: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grid:
    """What values a format can hold: scale * level - low, scale and low shared by ``group`` columns.

    levels : integers code_min..code_max, or those of ``table``. ladder : candidate scales are the group's largest weight (is_affine:
    its span) by each of these. block : columns whose integer scales int_min..int_max share the number they multiply; int_max 0:
    scales are stored themselves, rounded by ``rounding``.
    """

    group: int
    ladder: tuple[float, ...]
    code_min: int
    code_max: int
    block: int = 0
    refits: int = 2
    rounding: int = _NOT
    is_affine: bool = False
    int_min: int = 0
    int_max: int = 0
    neighbours: tuple[int, ...] = (0, -1, 1)
    table: tuple[float, ...] = _NO_TABLE


def _steps(first: float, last: float, step: float, both_signs: bool = False) -> tuple[float, ...]:
    values = tuple(np.arange(first, last + step / 2, step).tolist())
    return (*(-v for v in values), *values) if both_signs else values


GRIDS = {
    "Q3_K": Grid(16, _steps(2.75, 4.75, 0.25, True), -4, 3, 256, int_min=-32, int_max=31),
    "MXFP4": Grid(32, (8, 4, 16), 0, 14, 32, refits=0, rounding=_POWER_OF_TWO, table=_E2M1),
    "Q4_0": Grid(32, _steps(5.6, 9.6, 0.25, True), -8, 7, 32, rounding=_FP16),
    "Q4_K": Grid(32, _steps(12.5, 17, 0.5), 0, 15, 256, is_affine=True, int_max=63),
    "Q5_K": Grid(32, _steps(27, 33, 1), 0, 31, 256, is_affine=True, int_max=63),
    "Q6_K": Grid(16, tuple(-d for d in _steps(28, 36.5, 0.5)), -32, 31, 256, int_min=-128, int_max=127),
    "Q8_0": Grid(32, _steps(126, 130, 1), -127, 127, 32, rounding=_FP16),
}


def packed_grid(weight_format: str, layout: MatrixLayout) -> Grid:
    """Of a packed integer format with this layout's groups."""
    fmt = get_format(weight_format)
    ladder = search_ladder(fmt, layout.scales_are_bf16)
    rounding = _BF16 if layout.scales_are_bf16 else _NOT
    return Grid(layout.group_size, tuple(ladder.tolist()), fmt.code_min, fmt.code_max, rounding=rounding)  # fmt: skip


@dataclass(frozen=True)
class Factor:
    """H = (I + upper) diag(weight) (I + upper)^T: float32 (K, K), strictly upper, and (K,), scaled to a mean of 1."""

    upper: np.ndarray
    weight: np.ndarray


def factorise(hessian: np.ndarray, damping: float = DAMPING) -> Factor:
    """Factor second moments, float (K, K), symmetric; only zeros make every weight equally important.

    Raises ValueError on NaN or inf. Moments that are not positive definite are damped more, at last to their diagonal.
    """
    if not np.isfinite(hessian).all():
        raise ValueError("the inputs of the calibration hold NaN or inf: the model overflows on that text")
    h = np.asarray(hessian, np.float64)
    diagonal = np.diag(h)
    mean = diagonal.mean()
    if mean <= 0:
        return Factor(np.zeros(h.shape, F), np.ones(len(h), F))
    while damping < 1:
        try:
            damped = h + np.diag(np.full(len(h), damping * mean))
            v = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # upper triangular, H = V V^T
            break
        except np.linalg.LinAlgError:
            damping *= 10
    else:
        v = np.diag(np.sqrt(np.maximum(diagonal, 0) + mean))
    d = np.diag(v)
    upper = np.ascontiguousarray(np.triu(v / d, 1), F)
    return Factor(upper, (d * d / (d * d).mean()).astype(F))


def padded(factor: Factor, columns: int) -> Factor:
    """The same with columns behind that no error reaches."""
    more = columns - len(factor.weight)
    return Factor(np.pad(factor.upper, (0, more)), np.pad(factor.weight, (0, more), constant_values=1))  # fmt: skip


@dataclass(frozen=True)
class Rounded:
    """What became of a matrix. codes int16 (K, rows); scales, lows float32 and ints int16 (2, groups, rows) by group of columns;
    supers float32 (2, blocks, rows): what integer scales and lows multiply. error : float32 (K, rows), weight minus value.
    loss : float32 (rows,), e H e^T with H scaled as in Factor.
    """

    codes: np.ndarray
    scales: np.ndarray
    lows: np.ndarray
    ints: np.ndarray
    supers: np.ndarray
    error: np.ndarray
    loss: np.ndarray


@cache
def _kernels() -> Any:
    try:
        return importlib.import_module("ktk._calibrate_numba")
    except ImportError as error:
        raise RuntimeError(
            "calibration runs on numba, which cannot be imported: pip install numba"
        ) from error


def round_matrix(w: np.ndarray, factor: Factor, grid: Grid) -> Rounded:
    """Round float32 (rows, K), finite; K a multiple of the grid's block and group. On one thread, mostly without the GIL."""
    kernels = _kernels()
    rows, columns = w.shape
    lanes = kernels.LANES
    x = np.zeros((columns, -(-rows // lanes) * lanes), F)
    x[:, :rows] = w.T
    target, error = x.copy(), np.empty_like(x)
    codes = np.empty(x.shape, np.int16)
    loss = np.zeros(x.shape[1], F)
    groups = columns // grid.group
    scales, lows = (np.zeros((groups, x.shape[1]), F) for _ in range(2))
    ints = np.zeros((2, groups, x.shape[1]), np.int16)
    step = max(grid.block, _COLUMNS // grid.group * grid.group, grid.group)
    supers = np.zeros((2, -(-columns // step), x.shape[1]), F)
    one_scale = groups == 1 and columns > _COLUMNS
    if one_scale:
        scales[0] = _row_scales(x, factor.weight, grid)
        step = _COLUMNS
    for i, start in enumerate(range(0, columns, step)):
        stop = min(start + step, columns)
        here = slice(start, stop)
        u, weight = np.ascontiguousarray(factor.upper[here, here]), factor.weight[here]
        if one_scale:
            kernels.round_with_scales(
                x[here], target[here], u, weight, scales[0], F(grid.code_min), F(grid.code_max), codes[here], error[here],
                loss,
            )  # fmt: skip
        else:
            g = slice(start // grid.group, stop // grid.group)
            kernels.round_block(
                x[here], target[here], u, weight, grid.group, np.array(grid.ladder, F), grid.refits, F(grid.code_min),
                F(grid.code_max), np.array(grid.table, F), grid.is_affine, grid.rounding, F(grid.int_min),
                F(grid.int_max), np.array(grid.neighbours, F), codes[here], scales[g], lows[g], ints[:, g], supers[:, i],
                error[here], loss,
            )  # fmt: skip
        if stop < columns:
            target[stop:] += factor.upper[here, stop:].T @ error[here]
    cut = slice(0, rows)
    return Rounded(
        codes[:, cut], scales[:, cut], lows[:, cut], ints[..., cut], supers[..., cut], error[:, cut], loss[cut]
    )  # fmt: skip


def _row_scales(x: np.ndarray, weight: np.ndarray, grid: Grid) -> np.ndarray:
    """One scale per row of least weighted squared error, float32 (rows,); x (K, rows).

    A weight w counts D_k (w^2 + mean(w^2)) times, as in ``ktk.reference.pack``: squares alone clip the large ones.
    """
    peak = np.abs(x).max(axis=0)
    square = x * x
    importance = weight[:, None] * (square + square.mean(axis=0))
    best, least = np.zeros_like(peak), np.full_like(peak, np.inf)
    for d in grid.ladder:
        scale = peak / F(d)
        q = np.clip(np.rint(x * _inverse(scale)), grid.code_min, grid.code_max)
        difference = x - q * scale
        error = (importance * difference * difference).sum(axis=0)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best.astype(F)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, 0 where it is 0."""
    return np.divide(F(1), scale, out=np.zeros_like(scale), where=scale != 0)


def calibrated_panels(
    w: np.ndarray, layout: MatrixLayout, spec: MoESpec, factor: Factor
) -> np.ndarray:
    """float32 or bf16 bits (out, in) as panels, uint8 (num_panels, panel_bytes), of a packed integer format."""
    fmt = get_format(spec.weight_format)
    columns = layout.num_groups * layout.group_size
    given = np.zeros((layout.num_panels * PANEL, columns), F)
    given[: w.shape[0], : w.shape[1]] = _finite(w)
    rounded = round_matrix(given, padded(factor, columns), packed_grid(fmt.name, layout))
    codes = (rounded.codes.T + fmt.zero_point).astype(np.uint8)
    return lay_panels(np.ascontiguousarray(codes[:, : layout.padded_in]), np.ascontiguousarray(rounded.scales.T), layout, fmt)  # fmt: skip


def calibrated_rows(w: np.ndarray, type: str, factor: Factor) -> np.ndarray:
    """float32 or bf16 bits (rows, in_features) as ggml blocks, uint8 (rows, row bytes). type : a name of GRIDS.

    Raises ValueError on NaN, inf, a weight above LARGEST, or in_features that are not whole blocks.
    """
    grid = GRIDS.get(type)
    if grid is None:
        raise ValueError(f"type={type!r}: must be one of {', '.join(GRIDS)} to be calibrated")
    given = _finite(w)
    peak = np.abs(given).max(initial=0)
    if peak > LARGEST:
        raise ValueError(
            f"weights reach {peak:.3g}: {type} takes at most {LARGEST:.0f}, its scales are half precision; "
            "mend the checkpoint"
        )
    rows, columns = given.shape
    if columns % grid.block:
        raise ValueError(f"in_features={columns}: {type} needs a multiple of {grid.block}")
    r = round_matrix(given, factor, grid)

    def by_block(values: np.ndarray) -> np.ndarray:
        """(parts of all blocks, rows) to (parts of a block, rows * blocks of a row): blocks in a row's order."""
        parts = values.reshape(columns // grid.block, -1, rows)
        return np.ascontiguousarray(parts.transpose(1, 2, 0)).reshape(parts.shape[1], -1)

    codes = by_block(r.codes)
    if not grid.int_max:
        scales = by_block(r.scales)[0]
        lay = {"Q4_0": oracle.lay_q4_0, "Q8_0": oracle.lay_q8_0, "MXFP4": _lay_mxfp4}[type]
        return lay(codes, scales).reshape(rows, -1)
    d, dmin = by_block(r.supers[0])[0], by_block(r.supers[1])[0]
    unsigned = (codes - grid.code_min).astype(np.uint8)
    ints = by_block(r.ints[0])
    if grid.is_affine:
        lay_affine = {"Q4_K": oracle.lay_q4_k, "Q5_K": oracle.lay_q5_k}[type]
        return lay_affine(unsigned, ints, by_block(r.ints[1]), d, dmin).reshape(rows, -1)
    lay_signed = {"Q3_K": oracle.lay_q3_k, "Q6_K": oracle.lay_q6_k}[type]
    return lay_signed(unsigned, ints, d).reshape(rows, -1)


def _lay_mxfp4(levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Indices of _E2M1 and scales of doubled values, powers of two."""
    magnitudes = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7])
    values = np.array(_E2M1)[levels]
    codes = magnitudes[np.abs(values)] + np.where(values < 0, 8, 0)
    exponent = scales.view(np.uint32) >> np.uint32(23)  # 2 ** (exponent - 127) doubled values
    return oracle.lay_mxfp4(codes, np.where(scales == 0, 0, exponent + 1))


def _finite(w: np.ndarray) -> np.ndarray:
    given = to_f32(w)
    if not np.isfinite(given).all():
        raise ValueError(NOT_FINITE)
    return given
