"""Stored experts row by row, as checkpoints and GPU kernels have them: codes and scales as they
are, or rounded to bf16.

fp8   codes e4m3 (rows, columns); scales float32, one for 128 rows and 128 columns
int4  two codes a byte, the low one first, value (code - 8) * scale; scales bf16, one for a group
bf16  (rows, columns); what is stored in any format, decoded and rounded once where it is another
"""

from __future__ import annotations

import numpy as np

from ktk._cy import native_module
from ktk.experts.dequantise import dequantise
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.layout import PANEL, MatrixLayout, matrix_layout
from ktk.experts.stored import StoredMatrix
from ktk.machine.threads import EngineLayout

BF16 = "bf16"


def own_codes(matrix: StoredMatrix) -> str | None:
    """Which of fp8, int4 and bf16 above has a matrix's codes as they are, None if none does."""
    name, is_turned = matrix.format.name, matrix.rotation.width > 0
    is_int4 = name == "int4" and matrix.group_size > 0 and not is_turned
    if name in ("fp8", BF16):
        return name
    return name if is_int4 and not matrix.in_features % matrix.group_size else None


class RowMajor:
    """One expert's projection.

    form : ``own_codes`` of the matrix, or bf16. stored : where the expert stands in the matrix.
    engine : whose threads take panels apart; None: NumPy does.

    Attributes
    ----------
    row_bytes : of a whole row of codes.
    scales : uint16 bf16 bits or float32 (out_features / rows, in_features / columns), or None.
    block : those rows and columns.

    Raises ValueError for repacked blocks, which nothing puts back in order.
    """

    def __init__(
        self, matrix: StoredMatrix, stored: int, form: str, engine: EngineLayout | None = None
    ) -> None:
        self._panels, self._engine = matrix.data[stored], engine
        self._codes: np.ndarray | None = None  # of all rows, where they do not come from panels
        self._layout: MatrixLayout | None = None
        self.scales: np.ndarray | None = None
        self.block = 1, 1
        self.shape = matrix.out_features, matrix.in_features
        if form == BF16 and matrix.format.name != BF16:
            self._codes = f32_to_bf16(dequantise(matrix, stored)).view(np.uint8)
            self._bits = 16
        else:
            sizes = matrix.in_features, matrix.out_features
            layout = matrix_layout(matrix.format, *sizes, matrix.group_size, 0, matrix.rotation)
            self._layout, self._bits = layout, layout.format.bits
            if form != BF16:
                self.scales, self.block = _scales(self._panels, layout)
        self.row_bytes = -(-matrix.in_features * self._bits // 8)

    def codes(self) -> np.ndarray:
        """All of them, uint8 (out_features, row_bytes)."""
        whole = np.empty((self.shape[0], self.row_bytes), np.uint8)
        self.write(slice(0, self.shape[0]), slice(0, self.row_bytes), whole)
        return whole

    def write(self, rows: slice, columns: slice, out: np.ndarray) -> None:
        """Codes of a part into ``out``, uint8, C-contiguous, of its size. columns : bytes of a
        row.
        """
        native = None if self._engine is None else native_module()
        first = columns.start * 8 // self._bits
        is_aligned = not rows.start % PANEL and not first % _UNIT and out.size
        if self._layout is None or native is None or not is_aligned:
            if self._codes is None:
                assert self._layout is not None
                self._codes = _codes(self._panels, self._layout)
            out[:] = self._codes[rows, columns]
            return
        panels = self._panels[rows.start // PANEL : -(-rows.stop // PANEL)]
        begin = self._layout.scale_bytes + first * self._bits // 8 * PANEL
        native.row_major(panels[:, begin:], self._bits, out, self._engine)


_UNIT = 8  # codes of a row that lie together, at most


def _scales(panels: np.ndarray, layout: MatrixLayout) -> tuple[np.ndarray, tuple[int, int]]:
    """A matrix's scales row by row, and how many rows and columns share one."""
    scales, plane = layout.scales(panels), layout.format.scales  # (panels, groups, 16 or 1)
    assert plane is not None
    if plane.rows > PANEL:
        scales = scales[:: plane.rows // PANEL]
    by_row = scales.transpose(0, 2, 1).reshape(-1, layout.num_groups)
    rows, groups = (
        -(-layout.out_features // plane.rows),
        -(-layout.in_features // layout.group_size),
    )
    return np.ascontiguousarray(by_row[:rows, :groups]), (plane.rows, layout.group_size)


def _codes(panels: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """uint8 (out_features, bytes of a row). What lies where in panels: ``ktk.experts.layout``."""
    bits, count = layout.format.bits, layout.num_panels
    words = layout.codes(panels).view("<u4").reshape(count, -1, PANEL)
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
