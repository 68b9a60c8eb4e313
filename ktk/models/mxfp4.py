"""MXFP4 as checkpoints have it to MXFP4 as GGUF has it: the same numbers, bytes in another order.

A checkpoint keeps the codes of a row, two a byte, the first in the low nibble, and apart from them one e8m0 scale for
32. A GGUF block is the scale, then 16 bytes: codes 0 to 15 in the low nibbles, 16 to 31 in the high ones.
Source: OCP Microscaling Formats 1.0; ggml's block_mxfp4.
"""

from __future__ import annotations

import numpy as np

BLOCK = 32


def mxfp4_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 codes (rows, columns / 2) and scales (rows, columns / 32) to blocks, uint8 (rows, columns / 32 * 17).

    Raises ValueError if a scale is NaN (255).
    """
    scales = scales.view(np.uint8)
    if (scales == 255).any():
        raise ValueError("holds NaN scales")
    rows, count = scales.shape
    pairs = codes.view(np.uint8).reshape(rows, count, BLOCK // 2)
    each = np.stack([pairs & 15, pairs >> 4], axis=3).reshape(rows, count, BLOCK)
    blocks = np.empty((rows, count, 1 + BLOCK // 2), np.uint8)
    blocks[:, :, 0] = scales
    blocks[:, :, 1:] = each[:, :, : BLOCK // 2] | (each[:, :, BLOCK // 2 :] << 4)
    return blocks.reshape(rows, -1)
