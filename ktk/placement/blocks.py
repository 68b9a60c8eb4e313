"""Blocks of GGUF files as kernels take them: in whole panels of rows, repacked if wished,
as floats where none reads them.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ktk._cy import native_module
from ktk.errors import BackendError
from ktk.experts.dequantise import dequantise
from ktk.experts.formats import BLOCKS
from ktk.experts.layout import K_ALIGN, PANEL, round_up
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.log import warn_once
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.placement.parts import layout_of


def kernel_types() -> tuple[str, ...]:
    """The ggml types that kernels read; empty where the extension is not built."""
    native = native_module()
    return () if native is None else tuple(name for name in native.formats() if name in BLOCKS)


def _without_kernel(matrix: StoredMatrix) -> StoredMatrix:
    """The same values in a float format: for types that no kernel reads.

    BackendError if gguf cannot either.
    """
    try:
        values = np.stack([dequantise(matrix, e) for e in range(len(matrix.data))])
    except ValueError as error:
        raise BackendError(
            f"LLAMAFILE: no kernel over GGUF type {matrix.format.name}, and {error}; kernels read "
            f"{', '.join(kernel_types())}"
        ) from error
    half = values.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), values)
    name = "F16" if exact else "F32"
    text = "GGUF type %s has no kernel: its weights run as a copy in %s"
    warn_once(f"no kernel {matrix.format.name}", text, matrix.format.name, name)
    raw = (half if exact else values).view(np.uint8)
    return StoredMatrix.of_rows(name, matrix.in_features, raw)


def whole_panels(matrix: StoredMatrix) -> StoredMatrix:
    """Rows in sixteens and, of float formats, in_features in whole steps; a zero-padded copy only
    where they are not.

    Panels are as they must be. BackendError for a type that neither a kernel nor the gguf package
    reads.
    """
    if matrix.format.is_packed:
        return matrix
    if matrix.format.name not in kernel_types():
        matrix = _without_kernel(matrix)
    experts, rows, row_bytes = matrix.data.shape
    in_features = round_up(matrix.in_features, K_ALIGN)
    if matrix.is_repacked or (rows % PANEL == 0 and in_features == matrix.in_features):
        return matrix
    bytes_in = matrix.format.row_bytes(in_features)
    data = aligned_buffer(experts * round_up(rows, PANEL) * bytes_in)
    data = data.reshape(experts, round_up(rows, PANEL), bytes_in)
    data[:, :rows, :row_bytes] = matrix.data
    return dataclasses.replace(matrix, data=data)


def in_whole_panels(experts: StoredExperts) -> StoredExperts:
    """Every matrix as ``whole_panels`` gives it."""
    whole = {name: whole_panels(matrix) for name, matrix in experts.matrices.items()}
    return dataclasses.replace(experts, gate=whole.get("gate"), up=whole["up"], down=whole["down"])


def repack(experts: StoredExperts, num_threads: int) -> StoredExperts:
    """A copy in huge-page memory, in the order the kernels read: the same bytes, values and
    results.

    It costs the experts' size in memory and saves the kernels the gathering of bytes from sixteen
    rows.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        copies = {
            name: _repacked(whole_panels(matrix), pool) for name, matrix in experts.matrices.items()
        }
    return dataclasses.replace(
        experts, gate=copies.get("gate"), up=copies["up"], down=copies["down"]
    )


def _repacked(matrix: StoredMatrix, pool: ThreadPoolExecutor) -> StoredMatrix:
    if matrix.is_repacked:
        return matrix
    native, data = native_module(), matrix.data
    out = aligned_buffer(data.size).reshape(data.shape)
    isa = cpu.best_isa()
    layout = layout_of(matrix, 0)
    list(pool.map(lambda e: native.repack_blocks(data[e], layout, isa, out[e]), range(len(data))))
    return dataclasses.replace(matrix, data=out, is_repacked=True)
