"""Codes and scales to panels and back, in NumPy; what lies where is said in ``ktk.experts.layout``."""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.experts.layout import PANEL, MatrixLayout

F = np.float32


def lay_panels(codes: np.ndarray, scales: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """codes uint8 (padded_out, padded_in), scales float32 (padded_out, num_groups) to uint8 (num_panels, panel_bytes)."""
    p, k = layout.num_panels, layout.padded_in
    out = np.zeros((p, layout.panel_bytes), np.uint8)
    rows = codes.reshape(p, PANEL, k // 4, 4).transpose(0, 2, 1, 3)  # (panels, K/4, 16, 4)
    if layout.format.bits == 4:
        rows = rows[:, 0::2] | (rows[:, 1::2] << 4)  # (panels, K/8, 16, 4)
    out[:, layout.scale_bytes :] = rows.reshape(p, -1)
    by_group = np.ascontiguousarray(
        scales.reshape(p, PANEL, -1).transpose(0, 2, 1)
    )  # (panels, groups, 16)
    stored = f32_to_bf16(by_group) if layout.scales_are_bf16 else by_group
    raw = stored.reshape(p, -1).view(np.uint8)
    out[:, : raw.shape[1]] = raw
    return out


def lay_float_panels(w: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """float32 or bf16 bits uint16 (out, in) to bf16 or fp32 panels, uint8 (num_panels, panel_bytes).

    bf16 bits go into bf16 panels as they are; float32 rounds half to even.
    """
    p, k, is_bf16 = layout.num_panels, layout.padded_in, layout.format.bits == 16
    if is_bf16 and w.dtype != np.uint16:
        w = f32_to_bf16(w)
    elif not is_bf16 and w.dtype == np.uint16:
        w = bf16_to_f32(w)
    padded = np.zeros((p * PANEL, k), np.uint16 if is_bf16 else F)
    padded[: w.shape[0], : w.shape[1]] = w
    pair = 2 if is_bf16 else 1  # k values that lie together
    rows = padded.reshape(p, PANEL, k // pair, pair).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(rows).reshape(p, -1).view(np.uint8)


def read_panels(panels: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, np.ndarray]:
    """Panels back to (codes uint8 (padded_out, padded_in), scales float32 (padded_out, num_groups));
    for float formats (weights float32 (padded_out, padded_in), an empty array)."""
    p, k = layout.num_panels, layout.padded_in
    raw = layout.codes(panels)
    if not layout.format.is_integer:
        if layout.format.bits == 16:
            w = bf16_to_f32(raw.view(np.uint16)).reshape(p, k // 2, PANEL, 2).transpose(0, 2, 1, 3)
        else:
            w = raw.view(F).reshape(p, k, PANEL, 1).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(w).reshape(p * PANEL, k), np.empty(0, F)
    if layout.format.bits == 4:
        pairs = raw.reshape(p, k // 8, 1, PANEL, 4)
        rows = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(p, k // 4, PANEL, 4)
    else:
        rows = raw.reshape(p, k // 4, PANEL, 4)
    codes = np.ascontiguousarray(rows.transpose(0, 2, 1, 3)).reshape(p * PANEL, k)
    stored = layout.scales(panels)
    scales = bf16_to_f32(stored) if layout.scales_are_bf16 else stored
    scales = scales.reshape(p, layout.num_groups, PANEL).transpose(0, 2, 1)
    return codes, np.ascontiguousarray(scales).reshape(p * PANEL, layout.num_groups)


def dequantised(panels: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """What panels say, float32 (out_features, in_features)."""
    w, scales = read_panels(panels, layout)
    if layout.format.is_integer:
        spread = np.repeat(scales, layout.group_size, axis=1)[:, : layout.padded_in]
        w = (w.astype(F) - F(layout.format.zero_point)) * spread
    return np.ascontiguousarray(w[: layout.out_features, : layout.in_features])
