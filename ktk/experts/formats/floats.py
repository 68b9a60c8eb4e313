"""Float codes NumPy lacks or does slowly: bf16 and fp8 e4m3, as bit patterns in unsigned arrays."""

from __future__ import annotations

from functools import cache

import numpy as np


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns, uint16 (...), to float32 (...); exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f32(x: np.ndarray) -> np.ndarray:
    """float32, float16 or uint16 bf16 bits (...) to float32 (...); float32 is not copied."""
    return bf16_to_f32(x) if x.dtype == np.uint16 else x.astype(np.float32, copy=False)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 (...) to bf16 bit patterns, uint16 (...): round half to even, NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


@cache
def e4m3_table() -> np.ndarray:
    """The 256 values of fp8 e4m3fn, float32 (256,). Source: OCP 8-bit floating point, E4M3."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7)
    )
    magnitude[(code & 127) == 127] = np.nan
    table = np.where(code >= 128, -magnitude, magnitude).astype(np.float32)
    table.flags.writeable = False
    return table
