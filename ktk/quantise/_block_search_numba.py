"""Numba twins of ``ktk.quantise.block_search``: same operations in the same order, 16 blocks in
lockstep so LLVM turns each loop over lanes into vector code. Run without the GIL. w float32
(blocks, weights of a block); out uint8 (blocks, bytes of a block) is written.
"""

from __future__ import annotations

import numba
import numpy as np

LANES = 16
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23, rounds half to even; codes stay far below 2**22
HALF_MAGIC = np.float32(
    0.75
)  # its unit in the last place is 2**-24, half precision's smallest step
HALF_NORMAL = np.float32(2.0**-14)  # smallest normal number of half precision
HALF_STEPS = np.float32(2.0**24)
ZERO, ONE = np.float32(0), np.float32(1)


@numba.njit(nogil=True, cache=True)
def _load(w, first, x, tiny):
    """Blocks first, first + 1, ...

    of w as columns of x (weights, 16); what is too small or behind the end is 0.
    """
    num_k = x.shape[0]
    for n in range(LANES):
        peak = ZERO
        if first + n < w.shape[0]:
            for k in range(num_k):
                v = w[first + n, k]
                x[k, n] = v
                peak = max(peak, abs(v))
        if peak < tiny:
            for k in range(num_k):
                x[k, n] = ZERO


@numba.njit(nogil=True, cache=True)
def _half_up(scale, bits):
    """Each of scale (16,), 0 or more, to the next half-precision number not below it; bits :
    a view of scale.
    """
    for n in range(LANES):
        if scale[n] < HALF_NORMAL:
            scale[n] = np.ceil(scale[n] * HALF_STEPS) / HALF_STEPS
        else:
            bits[n] = (bits[n] + np.uint32(0x1FFF)) & np.uint32(0xFFFFE000)


@numba.njit(nogil=True, cache=True)
def _half_nearest(scale, bits):
    """Each of scale (16,) to the nearest half-precision number, ties to even; bits :
    a view of scale.
    """
    for n in range(LANES):
        small = (scale[n] + HALF_MAGIC) - HALF_MAGIC
        b = bits[n]
        if abs(scale[n]) < HALF_NORMAL:
            scale[n] = small
        else:
            bits[n] = (b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) & np.uint32(
                0xFFFFE000
            )


@numba.njit(nogil=True, cache=True)
def _put_half(value, bits, out, row, at):
    """Write a half-precision number that float32 ``value`` (bit pattern ``bits``) holds exactly."""
    if abs(value) < HALF_NORMAL:
        h = np.uint32(abs(value) * HALF_STEPS)
    else:
        h = ((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(13)) - np.uint32(112 << 10)
    if value < ZERO:
        h |= np.uint32(0x8000)
    out[row, at] = np.uint8(h & np.uint32(255))
    out[row, at + 1] = np.uint8(h >> np.uint32(8))


@numba.njit(nogil=True, cache=True)
def _clip(q, low, high):
    q = low if q < low else q
    return high if q > high else q


@numba.njit(nogil=True, cache=True)
def _search_signed(x, k0, k1, ladder, refits, code_min, code_max, scratch, best):
    """Scale of least squared error of x[k0:k1] with codes code_min..code_max; best (16,)
    is written.
    """
    peak, inverse, best_gain, sum_xq, sum_qq = (
        scratch[0],
        scratch[1],
        scratch[2],
        scratch[3],
        scratch[4],
    )
    peak[:] = ZERO
    for k in range(k0, k1):
        for n in range(LANES):
            v = x[k, n]
            peak[n] = v if abs(v) > abs(peak[n]) else peak[n]
    best[:] = ZERO
    best_gain[:] = ZERO
    for step in range(ladder.shape[0] + refits):
        if step < ladder.shape[0]:
            for n in range(LANES):
                inverse[n] = ZERO if peak[n] == ZERO else ladder[step] / peak[n]
        else:
            for n in range(LANES):
                inverse[n] = ZERO if best[n] == ZERO else ONE / best[n]
        sum_xq[:] = ZERO
        sum_qq[:] = ZERO
        for k in range(k0, k1):
            for n in range(LANES):
                q = _clip((x[k, n] * inverse[n] + MAGIC) - MAGIC, code_min, code_max)
                sum_xq[n] += x[k, n] * q
                sum_qq[n] += q * q
        for n in range(LANES):
            s = ZERO if sum_qq[n] == ZERO else sum_xq[n] / sum_qq[n]
            gain = s * sum_xq[n]  # what these codes take from the sum of x * x
            if gain > best_gain[n]:
                best_gain[n] = gain
                best[n] = s


@numba.njit(nogil=True, cache=True)
def q8_0(w, tiny, out):
    x = np.empty((32, LANES), np.float32)
    scale = np.empty(LANES, np.float32)
    bits = scale.view(np.uint32)
    inverse = np.empty(LANES, np.float32)
    for first in range(0, w.shape[0], LANES):
        _load(w, first, x, tiny)
        scale[:] = ZERO
        for k in range(32):
            for n in range(LANES):
                scale[n] = max(scale[n], abs(x[k, n]))
        for n in range(LANES):
            scale[n] = scale[n] / np.float32(127)
        _half_up(scale, bits)
        for n in range(LANES):
            inverse[n] = ZERO if scale[n] == ZERO else ONE / scale[n]
        for n in range(min(LANES, w.shape[0] - first)):
            _put_half(scale[n], bits[n], out, first + n, 0)
            for k in range(32):
                q = _clip((x[k, n] * inverse[n] + MAGIC) - MAGIC, np.float32(-127), np.float32(127))
                out[first + n, 2 + k] = np.uint8(np.int32(q) & 255)


@numba.njit(nogil=True, cache=True)
def q4_0(w, tiny, ladder, refits, out):
    x = np.empty((32, LANES), np.float32)
    scale = np.empty(LANES, np.float32)
    bits = scale.view(np.uint32)
    scratch = np.empty((5, LANES), np.float32)
    low, high = np.float32(-8), np.float32(7)
    for first in range(0, w.shape[0], LANES):
        _load(w, first, x, tiny)
        _search_signed(x, 0, 32, ladder, refits, low, high, scratch, scale)
        _half_nearest(scale, bits)
        for n in range(min(LANES, w.shape[0] - first)):
            inverse = ZERO if scale[n] == ZERO else ONE / scale[n]
            _put_half(scale[n], bits[n], out, first + n, 0)
            for k in range(16):
                a = _clip((x[k, n] * inverse + MAGIC) - MAGIC, low, high)
                b = _clip((x[k + 16, n] * inverse + MAGIC) - MAGIC, low, high)
                out[first + n, 2 + k] = np.uint8((np.int32(a) + 8) | ((np.int32(b) + 8) << 4))


@numba.njit(nogil=True, cache=True)
def _e2m1(a):
    """The nearest of 0, 1, 2, 3, 4, 6, 8, 12 (doubled e2m1 values); ties to the even code."""
    fine = (a + MAGIC) - MAGIC
    middle = ((a * np.float32(0.5) + MAGIC) - MAGIC) * np.float32(2)
    coarse = ((a * np.float32(0.25) + MAGIC) - MAGIC) * np.float32(4)
    v = fine if a < np.float32(4) else (middle if a < np.float32(8) else coarse)
    return np.float32(12) if v > np.float32(12) else v


@numba.njit(nogil=True, cache=True)
def mxfp4(w, tiny, out):
    x = np.empty((32, LANES), np.float32)
    peak = np.empty(LANES, np.float32)
    peak_bits = peak.view(np.uint32)
    scale = np.empty(LANES, np.float32)
    scale_bits = scale.view(np.uint32)
    inverse = np.empty(LANES, np.float32)
    inverse_bits = inverse.view(np.uint32)
    exponent = np.empty(LANES, np.int32)
    best = np.empty(LANES, np.int32)
    best_error = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    for first in range(0, w.shape[0], LANES):
        _load(w, first, x, tiny)
        peak[:] = ZERO
        for k in range(32):
            for n in range(LANES):
                peak[n] = max(peak[n], abs(x[k, n]))
        best_error[:] = np.inf
        best[:] = 0
        for step in range(3):
            for n in range(LANES):
                # log2 of the peak, less the 2 of the largest code's, and one more or less
                e = np.int32(peak_bits[n] >> np.uint32(23)) - 2 + (0, 1, -1)[step]
                exponent[n] = min(max(e, 2), 252)
                scale_bits[n] = np.uint32(exponent[n] - 1) << np.uint32(23)
                inverse_bits[n] = np.uint32(255 - exponent[n]) << np.uint32(23)
            error[:] = ZERO
            for k in range(32):
                for n in range(LANES):
                    a = abs(x[k, n]) * inverse[n]
                    e = (a - _e2m1(a)) * scale[n]
                    error[n] += e * e
            for n in range(LANES):
                if error[n] < best_error[n]:
                    best_error[n] = error[n]
                    best[n] = exponent[n]
        for n in range(LANES):
            inverse_bits[n] = np.uint32(255 - best[n]) << np.uint32(23)
        for n in range(min(LANES, w.shape[0] - first)):
            out[first + n, 0] = np.uint8(0 if peak[n] == ZERO else best[n])
            for k in range(16):
                both = 0
                for half in range(2):
                    v = x[k + 16 * half, n]
                    a = np.int32(_e2m1(abs(v) * inverse[n]))
                    code = a if a < 5 else (5 if a == 6 else (6 if a == 8 else 7))
                    code |= 8 if (v < ZERO and a > 0) else 0
                    both |= code << (4 * half)
                out[first + n, 1 + k] = np.uint8(both)


@numba.njit(nogil=True, cache=True)
def q6_k(w, tiny, ladder, refits, deltas, out):
    x = np.empty((256, LANES), np.float32)
    codes = np.empty((256, LANES), np.uint8)
    ideal = np.empty((16, LANES), np.float32)
    chosen = np.empty((16, LANES), np.float32)
    scratch = np.empty((5, LANES), np.float32)
    d = np.empty(LANES, np.float32)
    bits = d.view(np.uint32)
    inverse_d = np.empty(LANES, np.float32)
    trial = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    best_error = np.empty(LANES, np.float32)
    low, high = np.float32(-32), np.float32(31)
    for first in range(0, w.shape[0], LANES):
        _load(w, first, x, tiny)
        d[:] = ZERO
        for b in range(16):
            _search_signed(x, 16 * b, 16 * b + 16, ladder, refits, low, high, scratch, ideal[b])
            for n in range(LANES):
                d[n] = max(d[n], abs(ideal[b, n]))
        for n in range(LANES):
            d[n] = d[n] / np.float32(127)
        _half_up(d, bits)
        for n in range(LANES):
            inverse_d[n] = ZERO if d[n] == ZERO else ONE / d[n]
        for b in range(16):
            best_error[:] = np.inf
            for step in range(deltas.shape[0]):
                for n in range(LANES):
                    c = (ideal[b, n] * inverse_d[n] + MAGIC) - MAGIC
                    trial[n] = _clip(c + deltas[step], np.float32(-128), np.float32(127))
                    scale[n] = d[n] * trial[n]
                    inverse[n] = ZERO if scale[n] == ZERO else ONE / scale[n]
                error[:] = ZERO
                for k in range(16 * b, 16 * b + 16):
                    for n in range(LANES):
                        q = _clip((x[k, n] * inverse[n] + MAGIC) - MAGIC, low, high)
                        e = x[k, n] - q * scale[n]
                        error[n] += e * e
                for n in range(LANES):
                    if error[n] < best_error[n]:
                        best_error[n] = error[n]
                        chosen[b, n] = trial[n]
            for n in range(LANES):
                scale[n] = d[n] * chosen[b, n]
                inverse[n] = ZERO if scale[n] == ZERO else ONE / scale[n]
            for k in range(16 * b, 16 * b + 16):
                for n in range(LANES):
                    q = _clip((x[k, n] * inverse[n] + MAGIC) - MAGIC, low, high)
                    codes[k, n] = np.uint8(np.int32(q) + 32)
        for n in range(min(LANES, w.shape[0] - first)):
            row = first + n
            for half in range(2):  # 128 weights: 64 bytes of low nibbles, 32 of high bits
                for k in range(32):
                    c0, c1 = codes[128 * half + k, n], codes[128 * half + 32 + k, n]
                    c2, c3 = codes[128 * half + 64 + k, n], codes[128 * half + 96 + k, n]
                    out[row, 64 * half + k] = (c0 & 15) | ((c2 & 15) << 4)
                    out[row, 64 * half + 32 + k] = (c1 & 15) | ((c3 & 15) << 4)
                    high_bits = (c0 >> 4) | ((c1 >> 4) << 2) | ((c2 >> 4) << 4) | ((c3 >> 4) << 6)
                    out[row, 128 + 32 * half + k] = high_bits
            for b in range(16):
                out[row, 192 + b] = np.uint8(np.int32(chosen[b, n]) & 255)
            _put_half(d[n], bits[n], out, row, 208)


@numba.njit(nogil=True, cache=True)
def _search_affine(x, k0, ladder, refits, scratch, best_scale, best_low):
    """Scale and subtracted minimum, both 0 or more,
    of least squared error of x[k0:k0+32] with codes 0..15.
    """
    low, high, inverse, offset, best_error, sum_y, sum_yy, sum_q, sum_qq, sum_yq = (
        scratch[0],
        scratch[1],
        scratch[2],
        scratch[3],
        scratch[4],
        scratch[5],
        scratch[6],
        scratch[7],
        scratch[8],
        scratch[9],
    )
    code_max, count = np.float32(15), np.float32(32)
    low[:] = ZERO
    high[:] = -np.inf
    for k in range(k0, k0 + 32):
        for n in range(LANES):
            v = x[k, n]
            low[n] = v if v < low[n] else low[n]
            high[n] = v if v > high[n] else high[n]
    sum_y[:] = ZERO
    sum_yy[:] = ZERO
    for k in range(k0, k0 + 32):
        for n in range(LANES):
            y = x[k, n] - low[n]
            sum_y[n] += y
            sum_yy[n] += y * y
    best_scale[:] = ZERO
    best_low[:] = ZERO
    best_error[:] = np.inf
    for step in range(ladder.shape[0] + refits):
        for n in range(LANES):
            if step < ladder.shape[0]:
                span = high[n] - low[n]
                inverse[n] = ZERO if span == ZERO else ladder[step] / span
                offset[n] = ZERO
            else:
                inverse[n] = ZERO if best_scale[n] == ZERO else ONE / best_scale[n]
                offset[n] = low[n] + best_low[n]
        sum_q[:] = ZERO
        sum_qq[:] = ZERO
        sum_yq[:] = ZERO
        for k in range(k0, k0 + 32):
            for n in range(LANES):
                y = x[k, n] - low[n]
                q = _clip(((y + offset[n]) * inverse[n] + MAGIC) - MAGIC, ZERO, code_max)
                sum_q[n] += q
                sum_qq[n] += q * q
                sum_yq[n] += y * q
        for n in range(LANES):
            determinant = count * sum_qq[n] - sum_q[n] * sum_q[n]
            s = (
                ZERO
                if determinant == ZERO
                else (count * sum_yq[n] - sum_y[n] * sum_q[n]) / determinant
            )
            c = (sum_y[n] - s * sum_q[n]) / count
            m = ZERO - (c + low[n])
            if m < ZERO:  # no minimum below zero can be stored: fit the scale alone
                m = ZERO
                t = sum_yq[n] + low[n] * sum_q[n]
                s = ZERO if sum_qq[n] == ZERO else t / sum_qq[n]
                c = ZERO - low[n]
            s = ZERO if s < ZERO else s
            e = sum_yy[n] + s * (s * sum_qq[n] - np.float32(2) * sum_yq[n])
            e = e + c * (np.float32(2) * (s * sum_q[n] - sum_y[n]) + count * c)
            if e < best_error[n]:
                best_error[n] = e
                best_scale[n] = s
                best_low[n] = m


@numba.njit(nogil=True, cache=True)
def q4_k(w, tiny, ladder, refits, deltas, out):
    x = np.empty((256, LANES), np.float32)
    codes = np.empty((256, LANES), np.uint8)
    ideal = np.empty((8, LANES), np.float32)
    ideal_low = np.empty((8, LANES), np.float32)
    scales = np.empty((8, LANES), np.float32)
    lows = np.empty((8, LANES), np.float32)
    scratch = np.empty((10, LANES), np.float32)
    d = np.empty(LANES, np.float32)
    d_bits = d.view(np.uint32)
    dmin = np.empty(LANES, np.float32)
    dmin_bits = dmin.view(np.uint32)
    inverse_d = np.empty(LANES, np.float32)
    inverse_dmin = np.empty(LANES, np.float32)
    trial = np.empty(LANES, np.float32)
    trial_low = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    low = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    best_error = np.empty(LANES, np.float32)
    sum_x = np.empty(LANES, np.float32)
    sum_q = np.empty(LANES, np.float32)
    code_max, scale_max = np.float32(15), np.float32(63)
    packed = np.empty(8, np.uint8)
    packed_low = np.empty(8, np.uint8)
    for first in range(0, w.shape[0], LANES):
        _load(w, first, x, tiny)
        d[:] = ZERO
        dmin[:] = ZERO
        for b in range(8):
            _search_affine(x, 32 * b, ladder, refits, scratch, ideal[b], ideal_low[b])
            for n in range(LANES):
                d[n] = max(d[n], ideal[b, n])
                dmin[n] = max(dmin[n], ideal_low[b, n])
        for n in range(LANES):
            d[n] = d[n] / scale_max
            dmin[n] = dmin[n] / scale_max
        _half_up(d, d_bits)
        _half_up(dmin, dmin_bits)
        for n in range(LANES):
            inverse_d[n] = ZERO if d[n] == ZERO else ONE / d[n]
            inverse_dmin[n] = ZERO if dmin[n] == ZERO else ONE / dmin[n]
        for b in range(8):
            best_error[:] = np.inf
            sum_x[:] = ZERO
            for k in range(32 * b, 32 * b + 32):
                for n in range(LANES):
                    sum_x[n] += x[k, n]
            for step in range(2 * deltas.shape[0]):
                if step % 2 == 0:
                    for n in range(LANES):
                        c = (ideal[b, n] * inverse_d[n] + MAGIC) - MAGIC
                        trial[n] = _clip(c + deltas[step // 2], ZERO, scale_max)
                        c = (ideal_low[b, n] * inverse_dmin[n] + MAGIC) - MAGIC
                        trial_low[n] = _clip(c, ZERO, scale_max)
                        scale[n] = d[n] * trial[n]
                        inverse[n] = ZERO if scale[n] == ZERO else ONE / scale[n]
                else:  # the best minimum for the codes just found
                    for n in range(LANES):
                        m = (scale[n] * sum_q[n] - sum_x[n]) / np.float32(32)
                        c = (m * inverse_dmin[n] + MAGIC) - MAGIC
                        trial_low[n] = _clip(c, ZERO, scale_max)
                for n in range(LANES):
                    low[n] = dmin[n] * trial_low[n]
                error[:] = ZERO
                sum_q[:] = ZERO
                for k in range(32 * b, 32 * b + 32):
                    for n in range(LANES):
                        q = _clip(((x[k, n] + low[n]) * inverse[n] + MAGIC) - MAGIC, ZERO, code_max)
                        e = x[k, n] - (q * scale[n] - low[n])
                        error[n] += e * e
                        sum_q[n] += q
                for n in range(LANES):
                    if error[n] < best_error[n]:
                        best_error[n] = error[n]
                        scales[b, n] = trial[n]
                        lows[b, n] = trial_low[n]
            for n in range(LANES):
                scale[n] = d[n] * scales[b, n]
                inverse[n] = ZERO if scale[n] == ZERO else ONE / scale[n]
                low[n] = dmin[n] * lows[b, n]
            for k in range(32 * b, 32 * b + 32):
                for n in range(LANES):
                    q = _clip(((x[k, n] + low[n]) * inverse[n] + MAGIC) - MAGIC, ZERO, code_max)
                    codes[k, n] = np.uint8(np.int32(q))
        for n in range(min(LANES, w.shape[0] - first)):
            row = first + n
            _put_half(d[n], d_bits[n], out, row, 0)
            _put_half(dmin[n], dmin_bits[n], out, row, 2)
            for b in range(8):
                packed[b] = np.uint8(np.int32(scales[b, n]))
                packed_low[b] = np.uint8(np.int32(lows[b, n]))
            for b in range(4):
                out[row, 4 + b] = packed[b] | ((packed[b + 4] >> 4) << 6)
                out[row, 8 + b] = packed_low[b] | ((packed_low[b + 4] >> 4) << 6)
                out[row, 12 + b] = (packed[b + 4] & 15) | ((packed_low[b + 4] & 15) << 4)
            for b in range(4):
                for k in range(32):
                    out[row, 16 + 32 * b + k] = codes[64 * b + k, n] | (
                        codes[64 * b + 32 + k, n] << 4
                    )
