"""Dropout by counting: which values are dropped follows from a seed and where they stand, so the
backward pass makes the mask again and nobody keeps it.
"""

from __future__ import annotations

import numpy as np

_STEP = np.uint32(0x9E3779B9)


def _fmix32(h: np.ndarray) -> np.ndarray:
    """uint32: the finaliser of MurmurHash3 (Appleby), which mixes all bits."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return np.asarray(h ^ (h >> np.uint32(16)))


def dropout_factors(
    seed: int, dropout: float, pairs: np.ndarray, is_down: bool, columns: int
) -> np.ndarray:
    """float32 (pairs, columns): 0 where a value is dropped, else 1 / (1 - dropout).

    seed : uint32. dropout : at least 0 and below 1. pairs : ints, token * top_k + slot of the call.
    is_down : of the down projection's input; gate and up share the other.
    """
    numbers = (2 * pairs + is_down).astype(np.uint32)
    base = _fmix32(np.uint32(seed) + _STEP * numbers)[:, None]
    bits = _fmix32(base + _STEP * np.arange(columns, dtype=np.uint32))
    kept = np.float32(1 / (1 - dropout))
    return np.where(bits >= np.uint32(int(dropout * 2**32)), kept, np.float32(0))
