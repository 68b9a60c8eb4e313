"""Rotation: outliers of a few channels spread over their neighbours before activations are rounded.

x' = H (s * x) / sqrt(width) on each block of ``width`` columns, s signs that a seed gives, H the
Hadamard matrix. Weights are stored rotated the same way, so W' x' = W x. What a checkpoint's large
channels did to a scale shared by many activations is gone, and weights become more alike: int8 with
one scale for 256 activations loses less than without rotation with one for 64.

The C kernels (``ktk/_cy/kernels/rows.c``) have the bits of ``rotate``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

F = np.float32
# Those whose 1 / sqrt(width) is a power of two: the only product, and it rounds nothing.
WIDTHS = (64, 256)
_CHUNK = 1 << 16
_MASK = 0xFFFFFFFFFFFFFFFF


class Rotation(NamedTuple):
    """width : columns of a block, one of WIDTHS; 0: columns stay as they are. seed : of the signs,
    0 to 2**32 - 1.
    """

    width: int = 0
    seed: int = 0

    @classmethod
    def of(cls, given: object) -> Rotation:
        """A width, or [width, seed] as JSON has it; ValueError for anything else."""
        parts = (given,) if isinstance(given, int) else given
        if not isinstance(parts, tuple | list) or not 1 <= len(parts) <= 2:
            raise ValueError(f"rotation={given!r}: must be a width, or a width and a seed")
        found = cls(*parts)
        if any(type(part) is not int for part in found) or found.width not in (0, *WIDTHS):
            raise ValueError(f"rotation={given!r}: the width must be 0, {_listed(WIDTHS)}")
        if not 0 <= found.seed < 1 << 32 or (found.seed and not found.width):
            raise ValueError(f"rotation={given!r}: the seed must be 0 to 2**32 - 1, 0 without one")
        return found


NO_ROTATION = Rotation()


def _listed(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))


def _splitmix64(state: int) -> int:
    """Steele, Lea, Flood, Fast splittable pseudorandom number generators, 2014."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
    return z ^ z >> 31


@functools.lru_cache(maxsize=64)
def sign_bits(seed: int, columns: int) -> np.ndarray:
    """uint64 (columns / 64,): column k changes its sign where bit k % 64 of word k / 64 is set.

    columns : a multiple of 64. Word i is splitmix64 of (seed << 32) + i.
    """
    words = [_splitmix64((seed << 32) + i) for i in range(columns // 64)]
    bits = np.array(words, np.uint64)
    bits.flags.writeable = False
    return bits


def signs(rotation: Rotation, columns: int) -> np.ndarray:
    """float32 (columns,), 1 or -1."""
    words = sign_bits(rotation.seed, columns)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.where(bits == 1, F(-1), F(1))


def _hadamard(x: np.ndarray, width: int) -> np.ndarray:
    """float32 (..., columns): butterflies of neighbours 1, 2, 4, ... apart, (a + b, a - b).

    Of _CHUNK values at a time, their columns as rows, which NumPy adds 4 times as fast.
    """
    blocks = x.reshape(-1, width)
    out, shrink = np.empty(blocks.shape, F), F(1 / math.isqrt(width))
    for start in range(0, len(blocks), _CHUNK // width):
        here = slice(start, start + _CHUNK // width)
        given = blocks[here].T.copy()  # (width, blocks)
        found, step = np.empty_like(given), 1
        while step < width:
            a, b = given.reshape(-1, 2, step * given.shape[1]).swapaxes(0, 1)
            sums = found.reshape(-1, 2, step * given.shape[1])
            np.add(a, b, out=sums[:, 0])
            np.subtract(a, b, out=sums[:, 1])
            given, found, step = found, given, 2 * step
        np.multiply(given.T, shrink, out=out[here])
    return out.reshape(x.shape)


def rotate(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """float32 (..., columns), columns a multiple of 64 and of the width."""
    if not rotation.width:
        return x
    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN spread over their block
        return _hadamard(x * signs(rotation, x.shape[-1]), rotation.width)


def rotate_back(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """What ``rotate`` made x of, except for rounding."""
    if not rotation.width:
        return x
    return _hadamard(x, rotation.width) * signs(rotation, x.shape[-1])
