"""Float weights to the blocks of GGUF files: Q8_0, Q4_0, Q4_K, Q6_K, MXFP4; by Numba, or without it
by NumPy, to the same bytes.

And an expert of any GGUF type back to float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import numpy as np

from ktk.experts.formats import BLOCKS, Format
from ktk.experts.formats.base import TINY_PEAK
from ktk.experts.formats.floats import to_f32
from ktk.quantise import block_search
from ktk.quantise.pack import NOT_FINITE

LARGEST = (
    2.0**18
)  # every type's scales hold weights up to this size; Q4_0's, the tightest, up to 65504 * 6
CHUNK_WEIGHTS = 1 << 20  # widened, checked and quantised at a time


# Types that the plain quantisers write, fewest bits per weight first.
BLOCK_TYPES = {row.name: row for row in BLOCKS.values() if row.search is not None}


def row_bytes(fmt: Format, in_features: int) -> int:
    """Bytes of a row of blocks; ValueError that names other types unless it holds whole ones."""
    try:
        return fmt.row_bytes(in_features)
    except ValueError as error:
        fitting = [t.name for t in BLOCK_TYPES.values() if in_features % t.block == 0]
        other = f", or take {', '.join(fitting)}" if in_features > 0 and fitting else ""
        raise ValueError(f"{error}{other}") from None


def block_type(name: str) -> Format:
    """The type called ``name``, in upper or lower case; ValueError lists the known ones."""
    found = BLOCK_TYPES.get(name.upper())
    if found is None:
        raise ValueError(f"type={name!r}: must be one of {', '.join(BLOCK_TYPES)}")
    return found


def quantise_rows(w: np.ndarray, type: str, out: np.ndarray | None = None) -> np.ndarray:
    """Quantise (rows, in_features) float32, or uint16 bf16 bits, to uint8 (rows, row bytes); into
    ``out`` if given.

    On one thread, and nearly all of it without the GIL. A block whose weights are all smaller than
    1e-30 is zeros, and so is, but in MXFP4, what lies below half precision's smallest scale
    (2**-24).
    Raises ValueError on NaN, inf, a weight above LARGEST in size, or in_features that are not whole
    blocks.
    """
    kind = block_type(type)
    if w.ndim != 2 or w.dtype not in (np.float32, np.uint16):
        raise ValueError(
            f"weights are {w.dtype} {w.shape}: must be float32 or uint16 bf16 bits, (rows, "
            "in_features)"
        )
    rows, columns = w.shape
    shape = (rows, row_bytes(kind, columns))
    out = np.empty(shape, np.uint8) if out is None else out
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}: must be C-contiguous uint8 {shape}")
    quantise = _quantiser(kind.name)
    step = max(CHUNK_WEIGHTS // columns, 1)
    for start in range(0, rows, step):
        x = np.ascontiguousarray(to_f32(w[start : start + step]))
        peak = np.abs(x).max()
        if not np.isfinite(peak):
            raise ValueError(NOT_FINITE)
        if peak > LARGEST:
            raise ValueError(
                f"weights reach {peak:.3g}: {kind.name} takes at most {LARGEST:.0f}, its scales "
                "are half precision; mend the checkpoint"
            )
        blocks = out[start : start + step].reshape(-1, kind.block_bytes)
        quantise(x.reshape(-1, kind.block), blocks)
    return out


@cache
def _quantiser(name: str) -> Callable[[np.ndarray, np.ndarray], None]:
    """The fastest one present."""
    try:
        twins = importlib.import_module("ktk.quantise._block_search_numba")
    except ImportError:
        return lambda w, out: with_numpy(name, w, out)
    compiled, search = getattr(twins, name.lower()), BLOCK_TYPES[name].search
    assert search is not None
    settings: tuple[object, ...] = ()
    if search.ladder:
        settings = (np.array(search.ladder, np.float32), search.refits)
    if search.neighbours:
        settings = (*settings, np.array(search.neighbours, np.float32))
    return lambda w, out: compiled(w, np.float32(TINY_PEAK), *settings, out)


def with_numpy(name: str, w: np.ndarray, out: np.ndarray) -> None:
    """Without Numba: w float32 (blocks, weights of a block), finite, into uint8 (blocks,
    bytes of a block).
    """
    x = np.ascontiguousarray(w.T)
    x[:, np.abs(x).max(axis=0) < TINY_PEAK] = 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        out[:] = getattr(block_search, name.lower())(x)
