"""Quantise one projection and lay it out in panels, and read panels back: the model of ``ktk.quantise.pack``.

Searched scales. For each group of the integer formats the candidates are ``+-peak / d`` for a ladder of
denominators d around the largest code (both signs where the code range is lopsided: the extra code then
serves whichever side needs it), followed by two least-squares refits of the best one. A candidate is
rounded to the precision it is stored in before it is judged. The least weighted squared error wins, the
earlier candidate on a tie; a weight w counts w^2 + mean(w^2) times, for plain squares would clip the large
weights that matter most (SmolLM2-as-MoE, KL at int4: group 32 0.168 either way, 128 0.300 -> 0.251, per
channel 0.94 -> 0.34). All is relative to the group's peak, so nothing over- or underflows. Sums run over k
in order, without FMA, so every implementation finds the same codes.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.base import QuantFormat
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.experts.layout import PANEL, MatrixLayout

F = np.float32
TINY_PEAK = F(1e-30)  # a group whose weights are all smaller is stored as zeros
REFITS = 2


def search_ladder(fmt: QuantFormat, grouped: bool) -> np.ndarray:
    """Denominators d, float32 (candidates,); negative d puts the peak on the code range's other end."""
    if fmt.bits == 8:  # absmax, then clipping ever more: outliers of a long channel
        return np.array([127 * (1 + 0.02 * i) for i in range(16)], F)
    span = np.arange(5.6, 9.61, 0.25) if grouped else np.arange(6.5, 18.1, 0.5)
    return np.concatenate([-span, span]).astype(F)


def absmax_ladder(fmt: QuantFormat) -> np.ndarray:
    """The one candidate plain absmax quantisation uses; for measuring what the search gains."""
    return np.array([fmt.code_max], F)


def quantise_weights(
    w: np.ndarray, layout: MatrixLayout, fmt: QuantFormat, ladder: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (out, in) to codes uint8 (padded_out, padded_in) and scales float32 (padded_out, num_groups).

    Raises ValueError on NaN or inf.
    """
    if not np.isfinite(w).all():
        raise ValueError("weights hold NaN or inf")
    refits = REFITS if ladder is None else 0
    if ladder is None:
        ladder = search_ladder(fmt, layout.scales_are_bf16)
    group, groups = layout.group_size, layout.num_groups
    padded = np.zeros((layout.num_panels * PANEL, groups * group), F)
    padded[: w.shape[0], : w.shape[1]] = w
    x = padded.reshape(-1, groups, group)
    peak = np.abs(x).max(axis=2)
    peak = np.where(peak < TINY_PEAK, F(0), peak)
    with np.errstate(divide="ignore"):
        inverse_peak = np.where(peak == 0, F(0), F(1) / peak)
    relative = x * inverse_peak[:, :, None]
    sizes = np.minimum(layout.padded_in - group * np.arange(groups), group).astype(F)

    def ordered_sum(terms: np.ndarray) -> np.ndarray:
        return np.add.accumulate(terms, axis=2, dtype=F)[:, :, -1]

    importance = relative * relative
    importance = importance + (ordered_sum(importance) / sizes)[:, :, None]

    def judge(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if layout.scales_are_bf16:
            scale = bf16_to_f32(f32_to_bf16(scale))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = np.where(scale == 0, F(0), F(1) / scale)
            q = np.rint(x * inverse[:, :, None])
            q = np.minimum(np.maximum(q, F(fmt.code_min)), F(fmt.code_max))
            error = relative - q * (scale * inverse_peak)[:, :, None]
            return scale, q, ordered_sum(importance * (error * error))

    best_scale, best_q, best_error = judge(peak / ladder[0])
    best_error = np.where(best_error < np.inf, best_error, F(np.inf))

    def keep_better(scale: np.ndarray) -> None:
        nonlocal best_scale, best_q, best_error
        scale, q, error = judge(scale)
        better = error < best_error
        best_scale = np.where(better, scale, best_scale)
        best_error = np.where(better, error, best_error)
        best_q = np.where(better[:, :, None], q, best_q)

    for d in ladder[1:]:
        keep_better(peak / d)
    for _ in range(refits):
        with np.errstate(invalid="ignore", over="ignore"):
            up = ordered_sum((importance * relative) * best_q)
            down = ordered_sum((importance * best_q) * best_q)
            keep_better(np.where(down == 0, F(0), up / down) * peak)
    codes = (best_q.astype(np.int32) + fmt.zero_point).astype(np.uint8).reshape(len(padded), -1)
    return np.ascontiguousarray(codes[:, : layout.padded_in]), best_scale


def lay_panels(
    codes: np.ndarray, scales: np.ndarray, layout: MatrixLayout, fmt: QuantFormat
) -> np.ndarray:
    """Codes and scales as ``quantise_weights`` gives them to panels, uint8 (num_panels, panel_bytes)."""
    p, k = layout.num_panels, layout.padded_in
    out = np.zeros((p, layout.panel_bytes), np.uint8)
    rows = codes.reshape(p, PANEL, k // 4, 4).transpose(0, 2, 1, 3)  # (panels, K/4, 16, 4)
    if fmt.bits == 4:
        rows = rows[:, 0::2] | (rows[:, 1::2] << 4)  # (panels, K/8, 16, 4)
    out[:, layout.scale_bytes :] = rows.reshape(p, -1)
    by_group = np.ascontiguousarray(
        scales.reshape(p, PANEL, -1).transpose(0, 2, 1)
    )  # (panels, groups, 16)
    stored = f32_to_bf16(by_group) if layout.scales_are_bf16 else by_group
    raw = stored.reshape(p, -1).view(np.uint8)
    out[:, : raw.shape[1]] = raw
    return out


def lay_float_panels(w: np.ndarray, layout: MatrixLayout, fmt: QuantFormat) -> np.ndarray:
    """float32 or bf16 bits uint16 (out, in) to bf16 or fp32 panels, uint8 (num_panels, panel_bytes).

    bf16 bits go into bf16 panels as they are; float32 rounds half to even.
    """
    p, k, is_bf16 = layout.num_panels, layout.padded_in, fmt.bits == 16
    if is_bf16 and w.dtype != np.uint16:
        w = f32_to_bf16(w)
    elif not is_bf16 and w.dtype == np.uint16:
        w = bf16_to_f32(w)
    padded = np.zeros((p * PANEL, k), np.uint16 if is_bf16 else F)
    padded[: w.shape[0], : w.shape[1]] = w
    pair = 2 if is_bf16 else 1  # k values that lie together
    rows = padded.reshape(p, PANEL, k // pair, pair).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(rows).reshape(p, -1).view(np.uint8)


def read_panels(
    panels: np.ndarray, layout: MatrixLayout, fmt: QuantFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Panels back to (codes uint8 (padded_out, padded_in), scales float32 (padded_out, num_groups));
    for float formats (weights float32 (padded_out, padded_in), an empty array)."""
    p, k = layout.num_panels, layout.padded_in
    raw = layout.codes(panels)
    if not fmt.is_integer:
        if fmt.bits == 16:
            w = bf16_to_f32(raw.view(np.uint16)).reshape(p, k // 2, PANEL, 2).transpose(0, 2, 1, 3)
        else:
            w = raw.view(F).reshape(p, k, PANEL, 1).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(w).reshape(p * PANEL, k), np.empty(0, F)
    if fmt.bits == 4:
        pairs = raw.reshape(p, k // 8, 1, PANEL, 4)
        rows = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(p, k // 4, PANEL, 4)
    else:
        rows = raw.reshape(p, k // 4, PANEL, 4)
    codes = np.ascontiguousarray(rows.transpose(0, 2, 1, 3)).reshape(p * PANEL, k)
    stored = layout.scales(panels)
    scales = bf16_to_f32(stored) if layout.scales_are_bf16 else stored
    scales = scales.reshape(p, layout.num_groups, PANEL).transpose(0, 2, 1)
    return codes, np.ascontiguousarray(scales).reshape(p * PANEL, layout.num_groups)
