"""Round weights with error feedback (GPTQ): packed formats and ggml blocks, better where the
experts' inputs are.

The loss of a row is e H e^T: e its rounding errors, H = X^T X / n the second moments of the inputs
X of a calibration text. With H = (I + U) D (I + U)^T, U strictly upper triangular and D diagonal,
it is the sum over columns k of D_k (t_k - q_k)^2, where t_k = w_k + sum over j < k of e_j U_jk:
columns are rounded in order, each towards its weight plus what the errors before it hand on
(Frantar et al., GPTQ, 2022, in the form of Chee et al., QuIP, 2023, which needs one Cholesky
factorisation and no inverse).

Scales come with their group: every candidate of a ladder is tried with the feedback inside the
group counted, then the scale of least loss for the best codes, then, where scales are stored as
integers of a block's scale, the integers around it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ktk.experts.formats import BLOCKS, Format
from ktk.experts.formats.base import NOT_ROUNDED, TO_BF16, Grid
from ktk.experts.formats.floats import to_f32
from ktk.experts.layout import PANEL, MatrixLayout, matrix_layout
from ktk.experts.panels import dequantised, lay_panels
from ktk.experts.rotation import NO_ROTATION, Rotation, rotate, rotate_back
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.quantise import block_bytes
from ktk.quantise.blocks import BLOCK_TYPES, LARGEST, quantise_rows
from ktk.quantise.levels import NO_NUMBA, round_levels
from ktk.quantise.pack import NOT_FINITE, check_expert, pack_matrix

F = np.float32
# Of H's mean diagonal, added to the diagonal: the text is a sample.
DAMPING = 0.01
# An expert's moments count as one of (its tokens + PRIOR * in_features), the layer's the rest.
PRIOR = 0.25
_BALANCE_BITS = 4  # channels are scaled by 2**-4 to 2**4, which half-precision scales can take
_COLUMNS = 128  # rounded between two products with the rest of U


@cache
def _compiled() -> Any:
    """The kernels of Numba; RuntimeError without it."""
    try:
        return importlib.import_module("ktk.quantise._feedback_numba")
    except ImportError as error:
        raise RuntimeError(NO_NUMBA) from error


def packed_grid(layout: MatrixLayout) -> Grid:
    """Of a packed integer format with this layout's groups."""
    fmt, rounding = layout.format, TO_BF16 if layout.scales_are_bf16 else NOT_ROUNDED
    ladder = tuple(layout.ladder.tolist())
    return Grid(layout.group_size, ladder, fmt.code_min, fmt.code_max, rounding=rounding)


@dataclass(frozen=True)
class Factor:
    """H = (I + upper) diag(weight) (I + upper)^T: float32 (K, K), strictly upper, and (K,),
    scaled to a mean of 1.
    """

    upper: np.ndarray
    weight: np.ndarray

    @property
    def mean_squares(self) -> np.ndarray:
        """The diagonal of H, float32 (K,): what an importance matrix holds."""
        squares: np.ndarray = self.weight + np.square(self.upper) @ self.weight
        return squares


def factorise(hessian: np.ndarray, damping: float = DAMPING) -> Factor:
    """Factor second moments, float (K, K), symmetric; only zeros make every weight equally
    important.

    Raises ValueError on NaN or inf. Moments that are not positive definite are damped more, at last
    to their diagonal.
    """
    if not np.isfinite(hessian).all():
        raise ValueError(
            "the inputs of the calibration hold NaN or inf: the model overflows on that text"
        )
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
    return Factor(
        np.pad(factor.upper, (0, more)), np.pad(factor.weight, (0, more), constant_values=1)
    )


@dataclass(frozen=True)
class Rounded:
    """What became of a matrix. codes int16 (K, rows); scales, lows float32 and ints int16 (2,
    groups, rows) by group of columns;
    supers float32 (2, blocks, rows): what integer scales and lows multiply. error : float32 (K,
    rows), weight minus value.
    loss : float32 (rows,), e H e^T with H scaled as in Factor.
    """

    codes: np.ndarray
    scales: np.ndarray
    lows: np.ndarray
    ints: np.ndarray
    supers: np.ndarray
    error: np.ndarray
    loss: np.ndarray


def round_matrix(w: np.ndarray, factor: Factor, grid: Grid) -> Rounded:
    """Round float32 (rows, K), finite; K a multiple of the grid's block and group.

    On one thread, mostly without the GIL.
    """
    kernels = _compiled()
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
                x[here],
                target[here],
                u,
                weight,
                scales[0],
                F(grid.code_min),
                F(grid.code_max),
                codes[here],
                error[here],
                loss,
            )
        else:
            g = slice(start // grid.group, stop // grid.group)
            kernels.round_block(
                x[here],
                target[here],
                u,
                weight,
                grid.group,
                np.array(grid.ladder, F),
                grid.refits,
                F(grid.code_min),
                F(grid.code_max),
                np.array(grid.table, F),
                grid.is_affine,
                grid.rounding,
                F(grid.int_min),
                F(grid.int_max),
                np.array(grid.neighbours, F),
                codes[here],
                scales[g],
                lows[g],
                ints[:, g],
                supers[:, i],
                error[here],
                loss,
            )
        if stop < columns:
            target[stop:] += factor.upper[here, stop:].T @ error[here]
    cut = slice(0, rows)
    return Rounded(
        codes[:, cut],
        scales[:, cut],
        lows[:, cut],
        ints[..., cut],
        supers[..., cut],
        error[:, cut],
        loss[cut],
    )


def _row_scales(x: np.ndarray, weight: np.ndarray, grid: Grid) -> np.ndarray:
    """One scale per row of least weighted squared error, float32 (rows,); x (K, rows).

    A weight w counts D_k (w^2 + mean(w^2)) times, as in the search of ``ktk.quantise.pack``:
    squares alone clip the large ones.
    """
    peak = np.abs(x).max(axis=0)
    square = x * x
    importance = weight[:, None] * (square + square.mean(axis=0))
    best, least = np.zeros_like(peak), np.full_like(peak, np.inf)
    for d in grid.ladder:
        scale = peak / F(d)
        inverse = np.divide(F(1), scale, out=np.zeros_like(scale), where=scale != 0)
        q = np.clip(np.rint(x * inverse), grid.code_min, grid.code_max)
        difference = x - q * scale
        error = (importance * difference * difference).sum(axis=0)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best.astype(F)


def calibrated(
    w: np.ndarray,
    fmt: Format,
    factor: Factor,
    group_size: int = 0,
    rotation: Rotation = NO_ROTATION,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 or bf16 bits (out, in) as they are stored in ``fmt``: panels, uint8 (num_panels,
    panel_bytes), or blocks, uint8 (out, row bytes). group_size, rotation : of panels, as in
    MoESpec; ``factor`` is then that of rotated inputs.

    And the values they hold, float32 (out, in), not rotated. Raises ValueError on NaN, inf, a
    format without a grid; of blocks also on a weight above LARGEST, or in_features that are not
    whole blocks.
    """
    given = _finite(w)
    rows, columns = given.shape
    if fmt.is_packed:
        layout = matrix_layout(fmt, columns, rows, group_size, 0, rotation)
        wide = layout.num_groups * layout.group_size
        factor = padded(factor, wide)
        if not fmt.is_integer:  # floats, or fp8 whose scales are no search's
            panels = np.empty((layout.num_panels, layout.panel_bytes), np.uint8)
            pack_matrix(w, layout, panels)
            return panels, dequantised(panels, layout)
        if fmt.levels:
            panels = round_levels(given, layout, factor.upper, factor.weight).panels(layout)
            return panels, dequantised(panels, layout)
        whole = np.zeros((layout.num_panels * PANEL, wide), F)
        whole[:rows, :columns] = given
        whole = rotate(whole, rotation)
        rounded = round_matrix(whole, factor, packed_grid(layout))
        values = rotate_back(whole - rounded.error.T, rotation)[:rows, :columns]
        return _panels(rounded, layout), values
    if fmt.grid is None:
        known = ", ".join(row.name for row in BLOCKS.values() if row.grid)
        raise ValueError(f"type={fmt.name!r}: must be one of {known} to be calibrated")
    peak = np.abs(given).max(initial=0)
    if peak > LARGEST:
        raise ValueError(
            f"weights reach {peak:.3g}: {fmt.name} takes at most {LARGEST:.0f}, its scales are "
            "half precision; mend the checkpoint"
        )
    fmt.row_bytes(columns)  # refuses rows that are not whole blocks
    rounded = round_matrix(given, factor, fmt.grid)
    return _blocks(rounded, fmt), given - rounded.error.T


def _panels(rounded: Rounded, layout: MatrixLayout) -> np.ndarray:
    codes = (rounded.codes.T + layout.format.zero_point).astype(np.uint8)
    codes, scales = codes[:, : layout.padded_in], rounded.scales.T
    return lay_panels(np.ascontiguousarray(codes), np.ascontiguousarray(scales), layout)


def _blocks(rounded: Rounded, fmt: Format) -> np.ndarray:
    columns, rows = rounded.codes.shape
    grid, lay = fmt.grid, getattr(block_bytes, f"lay_{fmt.name.lower()}")
    assert grid is not None

    def by_block(values: np.ndarray) -> np.ndarray:
        """(parts of all blocks, rows) to (parts of a block, rows * blocks of a row):
        blocks in a row's order.
        """
        parts = values.reshape(columns // grid.block, -1, rows)
        return np.ascontiguousarray(parts.transpose(1, 2, 0)).reshape(parts.shape[1], -1)

    codes = by_block(rounded.codes)
    if not grid.int_max:
        blocks = lay(codes, by_block(rounded.scales)[0])
        return np.asarray(blocks.reshape(rows, -1))
    codes = (codes - grid.code_min).astype(np.uint8)
    parts = range(1 + grid.is_affine)  # scales, and minima
    ints = [by_block(rounded.ints[part]) for part in parts]
    supers = [by_block(rounded.supers[part])[0] for part in parts]
    return np.asarray(lay(codes, *ints, *supers).reshape(rows, -1))


def rows_alike(w: np.ndarray, type: str) -> np.ndarray:
    """The blocks of ``calibrated`` without inputs to calibrate on:
    every weight of a row counts alike.
    """
    if type in BLOCK_TYPES:
        return quantise_rows(w, type)
    size = w.shape[1]
    return calibrated(w, BLOCKS[type], Factor(np.zeros((size, size), F), np.ones(size, F)))[0]


def _finite(w: np.ndarray) -> np.ndarray:
    given = to_f32(w)
    if not np.isfinite(given).all():
        raise ValueError(NOT_FINITE)
    return given


# (projection, float32 or bf16 bits (out, in), the factor of its inputs' moments) to the bytes
# stored and the values they hold.
Encode = Callable[[str, np.ndarray, Factor], tuple[np.ndarray, np.ndarray]]


def packed_encoder(spec: MoESpec) -> Encode:
    """Panels of a packed integer format."""
    group = spec.group_size or 0
    return lambda name, w, factor: calibrated(w, spec.format, factor, group, spec.turns)


def lay_expert(
    spec: MoESpec, weights: ExpertWeights, stored: dict[str, np.ndarray], out: np.ndarray
) -> None:
    """One expert's calibrated panels, and its biases, into ``out``, uint8 (expert_bytes,)."""
    layout = spec.layout
    out[:] = 0
    for name in layout.projections:
        layout.panels(out, name)[:] = stored[name]
        bias = layout.bias(out, name)
        if bias is not None:
            given = getattr(weights, f"{name}_bias")
            bias.view(F)[: len(given)] = given


@dataclass(frozen=True)
class LayerInputs:
    """What came to a layer's experts.

    hidden float32 (tokens, hidden_size); topk_ids int64, topk_weights float32 (tokens, top_k).
    residual : float32 (tokens,), mean squares of what came to the layer and its output is added to;
    None where nobody looked.
    """

    hidden: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    residual: np.ndarray | None = None


class LayerCalibration:
    """Calibrates the experts of one layer, in any order and from any thread, on the inputs the
    model gave them.

    An error counts by its token's routing weight, squared, as it does in the layer's output. Gate
    and up: the expert's second moments, mixed with the whole layer's, which count as PRIOR *
    hidden_size tokens. Down: its inputs are what the expert's rounded gate and up make of them;
    mixed with their own diagonal alone, since channels of different experts have nothing in common.
    An expert without tokens so gets the layer's moments for gate and up, and plain rounding for
    down.

    Where up only multiplies, an intermediate channel's size can move from down to up and nothing is
    computed differently: down's columns are also tried times the square root of their inputs' size,
    and if that loses less, up's rows are divided by it. By powers of two, so that up keeps its
    codes. Not where columns are rotated, which makes their inputs alike.
    """

    def __init__(self, spec: MoESpec, inputs: LayerInputs) -> None:
        self.spec, self.inputs = spec, inputs
        if not np.isfinite(inputs.hidden).all() or not np.isfinite(inputs.topk_weights).all():
            raise ValueError(
                "the inputs of the calibration hold NaN or inf: the model overflows on that text"
            )
        x = turned(inputs.hidden, spec.turns)
        self._pooled = _moments(x, np.ones(len(x), F))
        a = spec.activation
        is_bounded = np.isfinite(a.up_min) or np.isfinite(a.up_max)
        self._up_multiplies = (
            spec.has_gate
            and not spec.turns.width
            and not (spec.has_bias or a.up_offset or is_bounded)
        )

    def expert(self, expert: int, weights: ExpertWeights, encode: Encode) -> dict[str, np.ndarray]:
        """The bytes of each projection.

        Raises ValueError / TypeError as ``ktk.quantise.pack.pack_expert``.
        """
        check_expert(self.spec, weights)
        token, slot = np.nonzero(self.inputs.topk_ids == expert)
        x, routing = self.inputs.hidden[token], self.inputs.topk_weights[token, slot]
        factor = self.input_factor(x, routing)
        stored: dict[str, np.ndarray] = {}
        first: dict[str, np.ndarray] = {}
        for name in ("gate", "up") if weights.gate is not None else ("up",):
            stored[name], values = encode(name, getattr(weights, name), factor)
            first[name] = x @ values.T  # (tokens, intermediate_size)
            bias = getattr(weights, f"{name}_bias")
            if bias is not None:
                first[name] += bias
        h = self.spec.activation.apply(first.get("gate"), first["up"])
        moments = self.moments(h, routing)
        down = self.down_factor(moments, routing)
        stored["down"], values = encode("down", weights.down, down)
        if not self._up_multiplies or not moments.any():
            return stored
        scales = _balancing_scales(np.diag(moments))
        w = to_f32(weights.down)
        balanced, scaled = encode("down", w * scales, _scaled(down, scales))
        if _loss(w - scaled / scales, down) < _loss(w - values, down):
            up = to_f32(weights.up) / scales[:, None]
            stored |= {"down": balanced, "up": encode("up", up, factor)[0]}
        return stored

    def input_factor(self, x: np.ndarray, routing: np.ndarray) -> Factor:
        """Of the inputs of gate and up, float32 (tokens, hidden_size), weighted by (tokens,)."""
        return factorise(_mix(self.moments(x, routing), routing, self._pooled))

    def down_factor(self, moments: np.ndarray, routing: np.ndarray) -> Factor:
        """Of those of down, whose ``moments`` are given."""
        return factorise(_mix(moments, routing, np.diag(np.diag(moments))))

    def moments(self, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
        """Second moments float32 (K, K) of inputs (tokens, columns), rotated as the spec says."""
        return _moments(turned(x, self.spec.turns), routing)


def turned(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """float32 (rows, columns), rotated, then padded to whole blocks."""
    if not rotation.width:
        return x
    return rotate(np.pad(x, ((0, 0), (0, -x.shape[1] % rotation.width))), rotation)


def _balancing_scales(mean_square: np.ndarray) -> np.ndarray:
    """Powers of two near the square root of each channel's root mean square, float32 (K,);
    1 for channels of the mean size.
    """
    share = np.maximum(mean_square / mean_square.mean(), F(1e-9))
    exponent = np.clip(np.rint(np.log2(share) / 4), -_BALANCE_BITS, _BALANCE_BITS)
    return np.exp2(exponent).astype(F)


def _scaled(factor: Factor, scales: np.ndarray) -> Factor:
    """The factor of inputs divided by scales (K,)."""
    weight = factor.weight / np.square(scales)
    return Factor(factor.upper * (scales / scales[:, None]), weight / weight.mean())


def _loss(error: np.ndarray, factor: Factor) -> float:
    """e H e^T summed over the rows of error (rows, K)."""
    return float(
        np.square(error + error @ factor.upper).sum(axis=0, dtype=np.float64) @ factor.weight
    )


def _moments(x: np.ndarray, routing: np.ndarray) -> np.ndarray:
    """float32 (K, K): the mean over tokens of x x^T,
    each weighted by its squared share of the routing; zeros without tokens.
    """
    total = float(np.square(routing, dtype=np.float64).sum())
    if not total:
        return np.zeros((x.shape[1], x.shape[1]), F)
    weighted = x * routing[:, None]
    moments: np.ndarray = (weighted.T @ weighted) / F(total)
    return moments


def _mix(moments: np.ndarray, routing: np.ndarray, prior: np.ndarray) -> np.ndarray:
    square = np.square(routing, dtype=np.float64)
    # tokens of equal weight that would tell as much
    tokens = float(square.sum() ** 2 / np.square(square).sum()) if square.any() else 0.0
    share = F(tokens / (tokens + PRIOR * len(moments)))
    mixed: np.ndarray = share * moments + (1 - share) * prior
    return mixed
