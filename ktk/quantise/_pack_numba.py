"""Numba twin of ``ktk.reference.pack.quantise_weights``: same operations in the same order, 16
channels in lockstep so LLVM turns each loop over a panel's channels into vector code. Runs without
the GIL.
"""

from __future__ import annotations

import numba
import numpy as np

F = np.float32
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23, rounds half to even; codes stay far below 2**22


@numba.njit(nogil=True, cache=True)
def quantise_panel(x, group, ladder, refits, code_min, code_max, bf16_scales, codes, scales):
    """x float32 (K, 16) of one panel; codes float32 (K, 16) and scales float32 (groups, 16)
    are written.
    """
    num_k = x.shape[0]
    zero, one = np.float32(0), np.float32(1)
    peak = np.empty(16, np.float32)
    best_error = np.empty(16, np.float32)
    best = np.empty(16, np.float32)
    scale = np.empty(16, np.float32)
    scale_bits = scale.view(np.uint32)
    inverse = np.empty(16, np.float32)
    inverse_peak = np.empty(16, np.float32)
    mean_square = np.empty(16, np.float32)
    relative = np.empty(16, np.float32)
    error = np.empty(16, np.float32)
    norm = np.empty(16, np.float32)
    for g in range(scales.shape[0]):
        k0 = g * group
        k1 = min(k0 + group, num_k)
        peak[:] = zero
        best_error[:] = np.inf
        for k in range(k0, k1):
            for n in range(16):
                v = abs(x[k, n])
                peak[n] = v if v > peak[n] else peak[n]
        for n in range(16):
            peak[n] = zero if peak[n] < np.float32(1e-30) else peak[n]
        for n in range(16):
            inverse_peak[n] = zero if peak[n] == zero else one / peak[n]
        mean_square[:] = zero
        for k in range(k0, k1):
            for n in range(16):
                r = x[k, n] * inverse_peak[n]
                mean_square[n] += r * r
        for n in range(16):
            mean_square[n] /= np.float32(k1 - k0)
        for step in range(ladder.shape[0] + refits):
            if step < ladder.shape[0]:
                d = ladder[step]
                for n in range(16):
                    scale[n] = peak[n] / d
            else:
                error[:] = zero
                norm[:] = zero
                for n in range(16):
                    inverse[n] = zero if best[n] == zero else one / best[n]
                for k in range(k0, k1):
                    for n in range(16):
                        q = (x[k, n] * inverse[n] + MAGIC) - MAGIC
                        q = code_min if q < code_min else q
                        q = code_max if q > code_max else q
                        r = x[k, n] * inverse_peak[n]
                        weight = r * r + mean_square[n]
                        error[n] += (weight * r) * q
                        norm[n] += (weight * q) * q
                for n in range(16):
                    scale[n] = (zero if norm[n] == zero else error[n] / norm[n]) * peak[n]
            if bf16_scales:
                for n in range(16):
                    b = scale_bits[n]
                    scale_bits[n] = (b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000
            for n in range(16):
                inverse[n] = zero if scale[n] == zero else one / scale[n]
                relative[n] = scale[n] * inverse_peak[n]
            error[:] = zero
            for k in range(k0, k1):
                for n in range(16):
                    q = (x[k, n] * inverse[n] + MAGIC) - MAGIC
                    q = code_min if q < code_min else q
                    q = code_max if q > code_max else q
                    r = x[k, n] * inverse_peak[n]
                    e = r - q * relative[n]
                    error[n] += (r * r + mean_square[n]) * (e * e)
            for n in range(16):
                if error[n] < best_error[n]:
                    best_error[n] = error[n]
                    best[n] = scale[n]
                elif step == 0:  # stands where every error overflows
                    best[n] = scale[n]
        for n in range(16):
            inverse[n] = zero if best[n] == zero else one / best[n]
            scales[g, n] = best[n]
        for k in range(k0, k1):
            for n in range(16):
                q = (x[k, n] * inverse[n] + MAGIC) - MAGIC
                q = code_min if q < code_min else q
                codes[k, n] = code_max if q > code_max else q
