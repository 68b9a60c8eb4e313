"""A bf16 kernel called by its symbol: without the operator, whose other kernels need the level's
vectors. Structs of ktk_kernels.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from ktk._cy import native_module
from ktk.experts.formats import get_format
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.spec import MoESpec
from ktk.machine.memory import aligned_buffer
from ktk.quantise.pack import pack_matrix

I32, I64, PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
GUARD = 64  # floats around out that must stay as they are

_MATRIX = (
    "format padded_in num_panels group_size activation_group scales_are_bf16 multiplier_group "
    "is_repacked rotation rotation_seed code_offset:q panel_bytes:q gemm:p codes_kind fine_group "
    "zero_point max_rows work_bytes:q"
)
_ROWS = "codes:p scales:p correction:p code_stride:q scale_stride:q correction_stride:q are_packed"
_ARGS = "w:p panels:p num_panels a:p rows:p num_rows out:p out_stride:q next:p work:p"


def _fields(text: str) -> Iterator[tuple[str, Any]]:
    for field in text.split():
        name, _, kind = field.partition(":")
        yield name, {"": I32, "q": I64, "p": PTR}[kind]


class Matrix(ctypes.Structure):
    _fields_ = list(_fields(_MATRIX))


class Rows(ctypes.Structure):
    _fields_ = list(_fields(_ROWS))


class Args(ctypes.Structure):
    _fields_ = list(_fields(_ARGS))


class Bf16Gemm:
    """``symbol`` over weights float32 (out, in) in bf16 panels."""

    def __init__(self, symbol: str, weights: np.ndarray) -> None:
        out_features, in_features = weights.shape
        spec = MoESpec(1, out_features, in_features, get_format("bf16").name, has_gate=False)
        self.layout = spec.layout.down
        size = self.layout.num_panels * self.layout.panel_bytes
        self.panels = aligned_buffer(size).reshape(self.layout.num_panels, -1)
        pack_matrix(weights, self.layout, self.panels)
        self.run = ctypes.CDLL(native_module().__file__)[symbol]
        self.run.restype = None

    def __call__(
        self, x: np.ndarray, index: np.ndarray, num_panels: int, work_bytes: int
    ) -> np.ndarray:
        """float32 (rows of index, 16 * num_panels), of x (rows, in) at ``index``.

        Raises AssertionError if anything beyond work_bytes or the output's rows was written.
        """
        layout, rows = self.layout, np.ascontiguousarray(index, np.int32)
        stride = 2 * layout.padded_in + 64
        codes = aligned_buffer(len(x) * stride).reshape(len(x), stride)
        codes[:] = 0xFF  # NaN wherever nobody wrote
        codes[:, : 2 * layout.padded_in] = 0
        codes[:, : 2 * x.shape[1]] = f32_to_bf16(x).view(np.uint8)
        width = 16 * num_panels + GUARD
        out = np.full((len(rows) + 2, width), 7, np.float32)
        work = aligned_buffer(work_bytes + 4096)
        work[:] = 0xFF
        matrix = Matrix(padded_in=layout.padded_in, panel_bytes=layout.panel_bytes)
        a = Rows(codes=codes.ctypes.data, code_stride=stride)
        self.run(
            ctypes.byref(
                Args(
                    w=ctypes.addressof(matrix),
                    panels=self.panels.ctypes.data,
                    num_panels=num_panels,
                    a=ctypes.addressof(a),
                    rows=rows.ctypes.data,
                    num_rows=len(rows),
                    out=out[1].ctypes.data,
                    out_stride=width,
                    next=None,
                    work=work.ctypes.data,
                )
            )
        )
        assert (work[work_bytes:] == 0xFF).all()
        assert (out[[0, -1]] == 7).all()
        assert (out[1:-1, 16 * num_panels :] == 7).all()
        return out[1:-1, : 16 * num_panels].copy()
