"""How keys and values lie in an int8 cache: the oracle of ``_cy/kernels/attention.c`` and
``attend.c``.

A row is a token's key or value of one head. Its codes are those of activations with one group a
row: scale = amax / 127, code = round-half-even(x * (127 / amax)), in fp32. Behind the codes lies
the scale. What attention reads is code * scale in fp32.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.rows import quantise_activations

SCALE_BYTES = 4


def int8_rows(x: np.ndarray) -> np.ndarray:
    """x : float32 (..., width), width a multiple of 16. Returns int8 (..., width + 4)."""
    width = x.shape[-1]
    flat = np.ascontiguousarray(x, np.float32).reshape(-1, width)
    made = quantise_activations(flat, width, width)
    rows = np.concatenate([made.codes, made.scales.view(np.int8)], -1)
    return rows.reshape(*x.shape[:-1], width + SCALE_BYTES)


def float_rows(rows: np.ndarray) -> np.ndarray:
    """rows : int8 (..., width + 4). Returns float32 (..., width): what attention reads."""
    scales = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view(np.float32)
    return rows[..., :-SCALE_BYTES].astype(np.float32) * scales
