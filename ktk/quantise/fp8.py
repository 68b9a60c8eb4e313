"""Float weights to e4m3 codes with a scale a block of rows and columns:
where a checkpoint has none to keep.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.floats import e4m3_table, to_f32

F = np.float32
LARGEST = F(448)  # of e4m3


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """float32 (...) to codes, uint8 (...): round half to even, larger ones become the largest."""
    magnitude = np.minimum(np.abs(x), LARGEST)
    # 2 ** exponent of the place of the last bit: 2 ** -9 of denormals, three bits below the leading
    # one of others
    step = np.exp2(np.maximum(np.frexp(magnitude)[1] - 4, -9)).astype(F)
    rounded = np.rint(magnitude / step) * step
    codes = np.searchsorted(e4m3_table()[:127], rounded).astype(np.uint8)
    return codes | (np.signbit(x).astype(np.uint8) << np.uint8(7))


def quantise_blocks(w: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Finite float32 or bf16 bits (out, in) to codes uint8 (out, in) and scales float32 (blocks of
    rows, blocks of columns).

    A block's largest weight becomes 448; one of zeros has scale 0.
    """
    x, (high, wide) = to_f32(w), block
    rows, columns = -(-x.shape[0] // high), -(-x.shape[1] // wide)
    whole = np.zeros((rows * high, columns * wide), F)
    whole[: x.shape[0], : x.shape[1]] = x
    blocks = whole.reshape(rows, high, columns, wide)
    scales = (np.abs(blocks).max(axis=(1, 3)) / LARGEST).astype(F)
    inverse = np.divide(F(1), scales, out=np.zeros_like(scales), where=scales > F(1e-37))
    codes = to_e4m3(blocks * inverse[:, None, :, None]).reshape(whole.shape)
    return codes[: x.shape[0], : x.shape[1]], np.where(inverse > 0, scales, F(0))
