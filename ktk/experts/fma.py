"""float32 fused multiply-add in NumPy, rounded once like the hardware instruction.

a*b is exact in float64 (24 + 24 bits). The float64 sum a*b + c is made round-to-odd from its
TwoSum error, and a value rounded to odd at 53 bits rounds to float32 as the exact sum would.
Source: S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> np.ndarray:
    """round(a * b + c) for float32 arrays that broadcast; float32 result."""
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = np.atleast_1d(total).view(np.int64)
        error = np.broadcast_to(np.atleast_1d(error), bits.shape)
        fix = (
            (error != 0) & (bits & 1 == 0) & np.isfinite(np.atleast_1d(total)) & np.isfinite(error)
        )
        # One step in the direction of the error, in magnitude terms of the sign-magnitude pattern.
        step = np.where((error > 0) == (bits >= 0), 1, -1)
        odd = np.where(fix, bits + step, bits).view(np.float64)
        return odd.reshape(np.shape(total)).astype(np.float32)
