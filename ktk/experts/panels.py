"""Codes and scales to panels and back, in NumPy;
what lies where is said in ``ktk.experts.layout``.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.floats import as_bits, as_values, bf16_to_f32, f32_to_bf16
from ktk.experts.layout import PANEL, MatrixLayout
from ktk.experts.rotation import rotate_back

F = np.float32


def _unit(layout: MatrixLayout) -> int:
    """k of a channel that lie together."""
    return {16: 2, 32: 1}.get(layout.format.bits, 4)


def lay_panels(
    codes: np.ndarray,
    scales: np.ndarray,
    layout: MatrixLayout,
    multipliers: np.ndarray | None = None,
    tensor_scale: float = 1.0,
) -> np.ndarray:
    """Codes (padded_out, padded_in), scales float32 (padded_out, num_groups) to uint8 (num_panels,
    panel_bytes).

    codes : uint8, bf16 bits or float32, as the format has them. Scales are not looked at where the
    format has none; of a panel that has one a group, its first row's count; they are rounded to
    what the layout stores. multipliers : uint8 (padded_out, groups), indices or zero points, where
    the layout has them. tensor_scale : of formats that have one.
    """
    p, k, unit = layout.num_panels, layout.padded_in, _unit(layout)
    out = np.zeros((p, layout.panel_bytes), np.uint8)
    rows = codes.reshape(p, PANEL, k // unit, unit).transpose(
        0, 2, 1, 3
    )  # (panels, K/unit, 16, unit)
    if layout.format.bits < 8:
        rows = _squeezed(rows, layout.format.bits)
    out[:, layout.scale_bytes :] = np.ascontiguousarray(rows).reshape(p, -1).view(np.uint8)
    if layout.scales_of_group:
        by_group = scales.reshape(p, PANEL, -1).transpose(0, 2, 1)  # (panels, groups, 16)
        by_group = np.ascontiguousarray(by_group[:, :, : layout.scales_of_group])
        raw = as_bits(by_group, layout.scale_dtype).reshape(p, -1).view(np.uint8)
        out[:, : raw.shape[1]] = raw
        if layout.format.has_tensor_scale:
            out[:, raw.shape[1] : raw.shape[1] + 4] = np.array([tensor_scale], F).view(np.uint8)
        if layout.multiplier_group:
            assert multipliers is not None
            even = multipliers.shape[1] + multipliers.shape[1] % 2
            each = np.zeros((p, PANEL, even), np.uint8)
            each[:, :, : multipliers.shape[1]] = multipliers.reshape(p, PANEL, -1)
            both = (each[:, :, 0::2] | each[:, :, 1::2] << 4).transpose(0, 2, 1).reshape(p, -1)
            out[:, raw.shape[1] : raw.shape[1] + both.shape[1]] = both
    return out


def _squeezed(rows: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 2, 3 or 4 bits, uint8 (panels, K/4, 16, 4), as panels hold them: uint8 (panels,
    K/32 * bits, 16, 4).
    """
    if bits == 4:
        return rows[:, 0::2] | (rows[:, 1::2] << 4)
    if bits == 2:
        return rows[:, 0::4] | (rows[:, 1::4] << 2) | (rows[:, 2::4] << 4) | (rows[:, 3::4] << 6)
    each = rows.reshape(len(rows), -1, 8, PANEL, 4)  # a unit of 32 k
    last = each[:, :, 6] | (each[:, :, 7] << 4)
    out = np.empty((len(rows), each.shape[1], 3, PANEL, 4), np.uint8)
    for i in range(3):
        spare = (last << (3 - i)) & 0x88  # bit i of both codes, on top of two nibbles
        out[:, :, i] = each[:, :, 2 * i] | (each[:, :, 2 * i + 1] << 4) | spare
    return out.reshape(len(rows), -1, PANEL, 4)


def _spread(raw: np.ndarray, bits: int) -> np.ndarray:
    """What ``_squeezed`` had: uint8 (panels, K/4, 16, 4)."""
    p = len(raw)
    if bits != 3:
        each = [(raw >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return np.stack(each, axis=2).reshape(p, -1, PANEL, 4)
    rows = raw.reshape(p, -1, 3, PANEL, 4)
    last = np.zeros((p, rows.shape[1], PANEL, 4), np.uint8)
    for i in range(3):
        last |= (rows[:, :, i] & 0x88) >> (3 - i)
    each = [(rows[:, :, i] >> shift) & 7 for i in range(3) for shift in (0, 4)]
    return np.stack([*each, last & 7, last >> 4], axis=2).reshape(p, -1, PANEL, 4)


def lay_float_panels(w: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """float32 or bf16 bits uint16 (out, in) to bf16 or fp32 panels, uint8 (num_panels,
    panel_bytes).

    bf16 bits go into bf16 panels as they are; float32 rounds half to even.
    """
    is_bf16 = layout.format.bits == 16
    if is_bf16 and w.dtype != np.uint16:
        w = f32_to_bf16(w)
    elif not is_bf16 and w.dtype == np.uint16:
        w = bf16_to_f32(w)
    return lay_panels(padded(w, layout), np.empty(0, F), layout)


def padded(w: np.ndarray, layout: MatrixLayout, value: int = 0) -> np.ndarray:
    """(out, in) filled up with ``value`` to (padded_out, padded_in)."""
    whole = np.full((layout.num_panels * PANEL, layout.padded_in), value, w.dtype)
    whole[: w.shape[0], : w.shape[1]] = w
    return whole


def read_panels(panels: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, np.ndarray]:
    """Panels back to (codes uint8 (padded_out, padded_in), of float formats their values, float32;
    and scales float32 (padded_out, num_groups), an empty array where there are none).

    Codes of levels come back as what is multiplied: level times multiplier, plus the zero point.
    """
    codes = _read_codes(panels, layout)
    if not layout.scales_of_group:
        return codes, np.empty(0, F)
    return codes, _by_row(layout.scale_values(panels), layout)


def read_fine_panels(
    panels: np.ndarray, layout: MatrixLayout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Panels of a format whose activations are rounded finely: values float32 (padded_out,
    padded_in) without scales, scales float32 (padded_out, groups) of ``layout.fine_group`` columns,
    and what multiplies all of them, float32 (padded_out,).
    """
    scales = _by_row(layout.group_scales(panels), layout)
    scales = np.repeat(scales, layout.group_size // layout.fine_group, axis=1)
    tensor = np.ones(layout.num_panels, F)
    if layout.format.has_tensor_scale:
        tensor = layout.tensor_scales(panels)
    steps = layout.padded_in // layout.fine_group
    return _read_codes(panels, layout), scales[:, :steps], np.repeat(tensor, PANEL)


def _by_row(scales: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """(panels, groups, scales_of_group) to (padded_out, groups)."""
    scales = np.repeat(scales, PANEL // layout.scales_of_group, axis=2)  # (panels, groups, 16)
    scales = scales.transpose(0, 2, 1)
    return np.ascontiguousarray(scales).reshape(layout.num_panels * PANEL, layout.num_groups)


def _read_codes(panels: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """The codes of ``read_panels``."""
    p, k, unit = layout.num_panels, layout.padded_in, _unit(layout)
    raw, fmt = layout.codes(panels), layout.format
    if fmt.bits < 8:
        rows = _spread(raw.reshape(p, -1, PANEL, 4), fmt.bits)
    else:
        rows = raw.view(f"u{fmt.bits // 8}").reshape(p, k // unit, PANEL, unit)
    codes = np.ascontiguousarray(rows.transpose(0, 2, 1, 3)).reshape(p * PANEL, k)
    if not fmt.is_integer:
        codes = as_values(codes, fmt.codes.dtype)
    if fmt.has_zero_points:
        zeros = layout.multipliers(panels).transpose(0, 2, 1).reshape(p * PANEL, -1)
        codes -= np.repeat(zeros.astype(F), layout.group_size, axis=1)[:, :k]
    if fmt.levels:
        codes = _products(codes, panels, layout)
    return codes


def _products(codes: np.ndarray, panels: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """uint8 (padded_out, padded_in): level times multiplier, plus the zero point."""
    fmt, group = layout.format, layout.multiplier_group
    values = np.array(fmt.levels, np.int16)[codes]
    if group:
        each = np.array(fmt.multipliers, np.int16)[layout.multipliers(panels)]
        by_row = each.transpose(0, 2, 1).reshape(len(codes), -1)  # (padded_out, groups)
        values *= np.repeat(by_row, group, axis=1)[:, : values.shape[1]]
    return (values + fmt.zero_point).astype(np.uint8)


def decoded_codes(panels: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """Panels of levels as codes of 8 bit: uint8 (num_panels, 16 * padded_in), [K/4][16][4]."""
    codes, _ = read_panels(panels, layout)
    units = codes.reshape(layout.num_panels, PANEL, layout.padded_in // 4, 4)
    return np.ascontiguousarray(units.transpose(0, 2, 1, 3)).reshape(layout.num_panels, -1)


def dequantised(panels: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """What panels say, float32 (out_features, in_features); rotated back where they are rotated."""
    w, scales = read_panels(panels, layout)
    if layout.format.is_integer:
        w = w.astype(F) - F(layout.format.zero_point)
    if scales.size:
        w = w * np.repeat(scales, layout.group_size, axis=1)[:, : layout.padded_in]
    w = rotate_back(w, layout.rotation)
    return np.ascontiguousarray(w[: layout.out_features, : layout.in_features])
