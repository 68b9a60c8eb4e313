"""Stored experts row by row, as checkpoints and GPU kernels have them: codes and scales as they
are, or rounded to bf16.

fp8   codes e4m3 (rows, columns); scales float32, one for 128 rows and 128 columns
int4  two codes a byte, the low one first, value (code - 8) * scale; scales bf16, one for a group
bf16  (rows, columns); what is stored in any format, decoded and rounded once where it is another
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ktk._cy import native_module
from ktk.experts.dequantise import dequantise
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.layout import PANEL, MatrixLayout, matrix_layout
from ktk.experts.stored import StoredMatrix
from ktk.machine.threads import EngineLayout

BF16 = "bf16"


class Rows(NamedTuple):
    """One expert's projection.

    codes : uint8 (out_features, bytes of a row). scales : uint16 bf16 bits or float32
    (out_features / rows, in_features / columns), or None; block : those rows and columns, columns
    also being what a row can be cut between.
    """

    codes: np.ndarray
    scales: np.ndarray | None
    block: tuple[int, int]


def own_codes(matrix: StoredMatrix) -> str | None:
    """Which of fp8, int4 and bf16 above has a matrix's codes as they are, None if none does."""
    name, is_turned = matrix.format.name, matrix.rotation.width > 0
    is_int4 = name == "int4" and matrix.group_size > 0 and not is_turned
    if name in ("fp8", BF16):
        return name
    return name if is_int4 and not matrix.in_features % matrix.group_size else None


def row_major(
    matrix: StoredMatrix, stored: int, form: str, engine: EngineLayout | None = None
) -> Rows:
    """The expert stored at ``stored``. form : ``own_codes`` of the matrix, or bf16. engine : whose
    threads take panels apart; None: NumPy does.

    ValueError for repacked blocks, which nothing puts back in order.
    """
    if form == BF16 and matrix.format.name != BF16:
        rounded = f32_to_bf16(dequantise(matrix, stored))
        return Rows(rounded.view(np.uint8), None, (1, 1))
    sizes = matrix.in_features, matrix.out_features
    layout = matrix_layout(matrix.format, *sizes, matrix.group_size, 0, matrix.rotation)
    panels = matrix.data[stored]
    native = None if engine is None else native_module()
    if native is None:
        codes = _codes(panels, layout)
    else:
        bits = layout.format.bits
        codes = np.empty((matrix.out_features, -(-matrix.in_features * bits // 8)), np.uint8)
        native.row_major(panels[:, layout.scale_bytes :], bits, codes, engine)
    if form == BF16:
        return Rows(codes, None, (1, 1))
    scales = layout.scales(panels)  # (panels, groups, scales of a group)
    groups = -(-matrix.in_features // layout.group_size)
    rows = PANEL // layout.scales_of_group
    if form == "fp8":
        plane = matrix.format.scales
        assert plane is not None
        rows = plane.rows
        scales = scales[:: rows // PANEL]
    by_row = scales.transpose(0, 2, 1).reshape(-1, layout.num_groups)
    by_row = np.ascontiguousarray(by_row[: -(-matrix.out_features // rows), :groups])
    return Rows(codes, by_row, (rows, layout.group_size))


def _codes(panels: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """uint8 (out_features, bytes of a row). What lies where in panels: ``ktk.experts.layout``."""
    bits, count = layout.format.bits, layout.num_panels
    width = {4: "<u4", 8: "u1", 16: "<u4"}[bits]
    words = layout.codes(panels).view(width).reshape(count, -1, PANEL)
    if bits == 4:
        words = _in_pairs(words)
    by_row = np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint8)
    by_row = by_row.reshape(count * PANEL, -1)
    return by_row[: layout.out_features, : -(-layout.in_features * bits // 8)]


def _in_pairs(words: np.ndarray) -> np.ndarray:
    """Eight codes of 4 bits in each uint32, from (k, k + 4) in a byte to (2k, 2k + 1)."""
    low, high = words & np.uint32(0x0F0F0F0F), (words >> np.uint32(4)) & np.uint32(0x0F0F0F0F)
    for half in (low, high):  # bytes 0a 0b 0c 0d to 00 00 ab cd, the first one lowest
        half |= half >> np.uint32(4)
        half &= np.uint32(0x00FF00FF)
        half |= half >> np.uint32(8)
        half &= np.uint32(0x0000FFFF)
    high <<= np.uint32(16)
    high |= low
    return high
