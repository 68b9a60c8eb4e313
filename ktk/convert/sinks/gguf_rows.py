"""Rows of a GGUF file's tensors: their bytes in each type that is written."""

from __future__ import annotations

import numpy as np

from ktk.experts.formats import BLOCKS
from ktk.experts.formats.floats import f32_to_bf16, to_f32
from ktk.quantise import blocks
from ktk.quantise.feedback import rows_alike

FALLBACK = "Q8_0"  # where rows are not whole blocks of 256


def is_whole(type: str, in_features: int) -> bool:
    """Whether a row of so many weights can be of a type."""
    return in_features % BLOCKS[type].block == 0


def row_bytes(type: str, in_features: int) -> int:
    """Bytes of a row in a block or float type; ValueError unless it holds whole blocks."""
    return blocks.row_bytes(BLOCKS[type], in_features)


def encode_rows(values: np.ndarray, type: str) -> np.ndarray:
    """(rows, in_features) float32, or uint16 bf16 bits, to what a file holds, C-contiguous.

    Raises ValueError on NaN, inf, or a weight that the type cannot hold.
    """
    if BLOCKS[type].block > 1:
        return rows_alike(values, type)
    floats = to_f32(values)
    if not np.isfinite(floats).all():
        raise ValueError("holds NaN or inf")
    if type == "BF16":
        return values if values.dtype == np.uint16 else f32_to_bf16(floats)
    if type == "F16":
        if np.abs(floats).max(initial=0) > 65504:
            raise ValueError(f"weights reach {np.abs(floats).max():.3g}: F16 takes at most 65504")
        return np.ascontiguousarray(floats, "<f2")
    return np.ascontiguousarray(floats, "<f4")
