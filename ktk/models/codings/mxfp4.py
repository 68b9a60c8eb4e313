"""MXFP4: e2m1 codes, two a byte, the first in the low nibble, and one e8m0 scale for 32 of a row.

    weight e2m1 (N, K/2)    scale e8m0 (N, K/32)

A GGUF file holds the same numbers in blocks: the scale, then 16 bytes: codes 0 to 15 in the low
nibbles, 16 to 31 in the high ones.
Source: OCP Microscaling Formats specification 1.0; ggml's block_mxfp4.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ktk.experts.formats.floats import look_up
from ktk.models.codings.scaled import MX_GROUP, Coding, ScaledCoding, Shapes


class _Mxfp4(ScaledCoding):
    name = "mxfp4"
    weight_dtypes = ("U8", "I8")

    def fit(self, found: Shapes) -> Coding | None:
        rows, columns = found.stored[0], found.stored[1] * 2
        is_whole = found.is_e8m0 and columns % MX_GROUP == 0
        if is_whole and found.scales == (rows, columns // MX_GROUP):
            return Coding(self.name, (rows, columns), (1, MX_GROUP))
        return None

    def wanted(self, found: Shapes) -> str:
        return (
            "8-bit integers are read as mxfp4 only, whose scale is e8m0 "
            f"({found.stored[0]}, {found.stored[1] * 2 // MX_GROUP})"
        )

    def values(self, raw: np.ndarray) -> np.ndarray:
        return look_up(_e2m1_pairs(), raw.view(np.uint8)).view(np.float32)


def nibbles(pairs: np.ndarray) -> np.ndarray:
    """8-bit integers (rows, n) to their codes of 4 bits, uint8 (rows, 2 n), low nibble first."""
    raw = pairs.view(np.uint8)
    return np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), -1)


@cache
def _e2m1_pairs() -> np.ndarray:
    """The two values of each byte of e2m1 codes, low nibble first, as their 8 bytes:
    uint64 (256,).
    """
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    value = np.concatenate([magnitude, -magnitude])
    byte = np.arange(256)
    return np.stack([value[byte & 15], value[byte >> 4]], axis=1).view(np.uint64).reshape(-1)


def mxfp4_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 codes (rows, columns / 2) and scales (rows, columns / 32) to blocks, uint8 (rows,
    columns / 32 * 17).

    Raises ValueError if a scale is NaN (255).
    """
    scales = scales.view(np.uint8)
    if (scales == 255).any():
        raise ValueError("holds NaN scales")
    rows, count = scales.shape
    pairs = codes.view(np.uint8).reshape(rows, count, MX_GROUP // 2)
    each = np.stack([pairs & 15, pairs >> 4], axis=3).reshape(rows, count, MX_GROUP)
    blocks = np.empty((rows, count, 1 + MX_GROUP // 2), np.uint8)
    blocks[:, :, 0] = scales
    blocks[:, :, 1:] = each[:, :, : MX_GROUP // 2] | (each[:, :, MX_GROUP // 2 :] << 4)
    return blocks.reshape(rows, -1)


MXFP4 = _Mxfp4()
