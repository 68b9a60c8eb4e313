"""The oracle of ``ktk.quantise.blocks``: float32 blocks to ggml blocks, in NumPy, from the formats' definitions.

Every function takes x, float32 (weights of a block, blocks), and returns uint8 (blocks, bytes of a block). All blocks go in
lockstep and sums run over the weights in order, so that the Numba twins (``ktk.quantise._blocks_numba``) give the same bytes.

Each searches its scales for the least squared error: candidates from a ladder of code ranges, then the scale that fits the
codes found; scales that are stored as small integers are chosen among the neighbours of the ideal one, judged with the very
numbers a reader decodes. Errors are not weighted: on groups of 32 that gave no lower KL (bench/RESULTS.md, Accuracy).
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats import BLOCKS
from ktk.experts.formats.blocks import NEIGHBOURS

F = np.float32


def ordered_sum(terms: np.ndarray) -> np.ndarray:
    """Over axis 0, first to last: (K, blocks) to (blocks,)."""
    return np.add.accumulate(terms, axis=0, dtype=F)[-1]


def inverse_of(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, F(0), F(1) / scale)


def codes_of(x: np.ndarray, inverse: np.ndarray, low: float, high: float) -> np.ndarray:
    """Rounded half to even; float32."""
    return np.minimum(np.maximum(np.rint(x * inverse), F(low)), F(high))


def half_up(scale: np.ndarray) -> np.ndarray:
    """The next half-precision number not below each; 0 or more. So that rounding clips no code."""
    half = scale.astype(np.float16)
    return np.where(half.astype(F) < scale, np.nextafter(half, np.float16(np.inf)), half).astype(F)


def half_bytes(scale: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 2) of numbers that half precision holds."""
    return scale.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _ladder(name: str) -> tuple[np.ndarray, int]:
    """What is tried for a type's scales, float32 (candidates,), and the refits."""
    search = BLOCKS[name].search
    assert search is not None
    return np.array(search.ladder, F), search.refits


def search_signed(x: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """Scale of least squared error of each column with codes low..high, of the type called ``name``."""
    ladder, refits = _ladder(name)
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    best = np.zeros_like(peak)
    best_gain = np.zeros_like(peak)
    for step in range(len(ladder) + refits):
        if step < len(ladder):
            inverse = np.where(peak == 0, F(0), ladder[step] / peak)
        else:
            inverse = inverse_of(best)
        q = codes_of(x, inverse, low, high)
        sum_xq, sum_qq = ordered_sum(x * q), ordered_sum(q * q)
        scale = np.where(sum_qq == 0, F(0), sum_xq / sum_qq)
        gain = scale * sum_xq  # what these codes take from the sum of x * x
        better = gain > best_gain
        best, best_gain = np.where(better, scale, best), np.where(better, gain, best_gain)
    return best


def search_affine(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and subtracted minimum, both 0 or more, of least squared error of each column with codes 0..15."""
    ladder, refits = _ladder(name)
    count = F(len(x))
    low = np.minimum(x.min(axis=0), F(0))
    span = x.max(axis=0) - low
    y = x - low
    sum_y, sum_yy = ordered_sum(y), ordered_sum(y * y)
    best_scale, best_min = np.zeros_like(low), np.zeros_like(low)
    best_error = np.full_like(low, np.inf)
    for step in range(len(ladder) + refits):
        if step < len(ladder):
            inverse, offset = np.where(span == 0, F(0), ladder[step] / span), np.zeros_like(low)
        else:
            inverse, offset = inverse_of(best_scale), low + best_min
        q = codes_of(y + offset, inverse, 0, 15)
        sum_q, sum_qq, sum_yq = ordered_sum(q), ordered_sum(q * q), ordered_sum(y * q)
        determinant = count * sum_qq - sum_q * sum_q
        scale = np.where(determinant == 0, F(0), (count * sum_yq - sum_y * sum_q) / determinant)
        shift = (sum_y - scale * sum_q) / count
        minimum = F(0) - (shift + low)
        # No minimum below zero can be stored: fit the scale alone.
        alone = np.where(sum_qq == 0, F(0), (sum_yq + low * sum_q) / sum_qq)
        is_below = minimum < 0
        scale, minimum = np.where(is_below, alone, scale), np.where(is_below, F(0), minimum)
        shift = np.where(is_below, F(0) - low, shift)
        scale = np.where(scale < 0, F(0), scale)
        error = sum_yy + scale * (scale * sum_qq - F(2) * sum_yq)
        error = error + shift * (F(2) * (scale * sum_q - sum_y) + count * shift)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_min = np.where(better, minimum, best_min)
    return best_scale, best_min


def q8_0(x: np.ndarray) -> np.ndarray:
    """fp16 scale, 32 codes of -127..127."""
    d = half_up(np.abs(x).max(axis=0) / F(127))
    return lay_q8_0(codes_of(x, inverse_of(d), -127, 127), d)


def lay_q8_0(q: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (32, blocks) of -127..127 and scales (blocks,) to uint8 (blocks, 34)."""
    return np.hstack([half_bytes(d), np.ascontiguousarray(q.T.astype(np.int8)).view(np.uint8)])


def q4_0(x: np.ndarray) -> np.ndarray:
    """fp16 scale of either sign, 32 codes of -8..7, plus 8; the first 16 in low nibbles."""
    d = search_signed(x, "Q4_0", -8, 7).astype(np.float16).astype(F) + F(0)
    return lay_q4_0(codes_of(x, inverse_of(d), -8, 7), d)


def lay_q4_0(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (32, blocks) of -8..7 and scales (blocks,) to uint8 (blocks, 18)."""
    q = (codes.T + F(8)).astype(np.uint8)
    return np.hstack([half_bytes(d), q[:, :16] | q[:, 16:] << 4])


def e2m1(a: np.ndarray) -> np.ndarray:
    """The nearest of 0, 1, 2, 3, 4, 6, 8, 12 (doubled e2m1 values); ties to the even code."""
    middle, coarse = np.rint(a * F(0.5)) * F(2), np.rint(a * F(0.25)) * F(4)
    return np.minimum(np.where(a < 4, np.rint(a), np.where(a < 8, middle, coarse)), F(12))


def mxfp4(x: np.ndarray) -> np.ndarray:
    """Power of two (e8m0), 32 codes of e2m1; the first 16 in low nibbles. Source: OCP MX v1.0."""

    def power(exponent: np.ndarray) -> np.ndarray:
        return (exponent.astype(np.uint32) << np.uint32(23)).view(F)

    peak = np.abs(x).max(axis=0)
    best = np.zeros(len(peak), np.int32)
    best_error = np.full_like(peak, np.inf)
    for step in (0, 1, -1):  # log2 of the peak, less the 2 of the largest code's, and around
        e = np.clip((peak.view(np.uint32) >> np.uint32(23)).astype(np.int32) - 2 + step, 2, 252)
        a = np.abs(x) * power(255 - e)
        difference = (a - e2m1(a)) * power(e - 1)
        error = ordered_sum(difference * difference)
        better = error < best_error
        best, best_error = np.where(better, e, best), np.where(better, error, best_error)
    a = e2m1(np.abs(x) * power(255 - best)).astype(np.int32)
    code = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7])[a]
    code = code + np.where((x < 0) & (a > 0), 8, 0)
    return lay_mxfp4(code, np.where(peak == 0, 0, best))


def lay_mxfp4(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """e2m1 codes (32, blocks) and e8m0 exponents (blocks,) to uint8 (blocks, 17)."""
    code = codes.T.astype(np.uint8)
    return np.hstack([exponents.astype(np.uint8)[:, None], code[:, :16] | code[:, 16:] << 4])


def q6_k(x: np.ndarray) -> np.ndarray:
    """256 weights: 16 groups of 16 with int8 scales and one fp16 scale of scales; codes -32..31, plus 32."""
    groups = x.reshape(16, 16, -1)
    ideal = np.stack([search_signed(g, "Q6_K", -32, 31) for g in groups])
    d = half_up(np.abs(ideal).max(axis=0) / F(127))
    chosen, codes = np.empty_like(ideal), np.empty((16, 16, x.shape[1]), np.uint8)
    for g, group in enumerate(groups):
        best_error = np.full_like(d, np.inf)
        for delta in map(F, NEIGHBOURS):
            trial = codes_of(ideal[g], inverse_of(d), -np.inf, np.inf) + delta
            trial = np.minimum(np.maximum(trial, F(-128)), F(127))
            scale = d * trial
            e = group - codes_of(group, inverse_of(scale), -32, 31) * scale
            error = ordered_sum(e * e)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            chosen[g] = np.where(better, trial, chosen[g])
        codes[g] = (codes_of(group, inverse_of(d * chosen[g]), -32, 31) + F(32)).astype(np.uint8)
    return lay_q6_k(codes.reshape(256, -1), chosen, d)


def lay_q6_k(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (256, blocks) of 0..63, integer scales (16, blocks) and d (blocks,) to uint8 (blocks, 210).

    Bytes: 128 of low nibbles, 64 of high bit pairs, 16 scales, d. Each half of 128 weights has its nibbles in 64 bytes,
    k and k + 64 together, and its bit pairs in 32 bytes, k, k + 32, k + 64 and k + 96 together.
    """
    q = codes.reshape(2, 4, 32, -1)  # half, quarter of it, weight
    low = np.stack([q[:, 0] & 15 | (q[:, 2] & 15) << 4, q[:, 1] & 15 | (q[:, 3] & 15) << 4], axis=1)
    high = q[:, 0] >> 4 | q[:, 1] >> 4 << 2 | q[:, 2] >> 4 << 4 | q[:, 3] >> 4 << 6
    integers = np.ascontiguousarray(scales.T.astype(np.int8)).view(np.uint8)
    return np.hstack([low.reshape(128, -1).T, high.reshape(64, -1).T, integers, half_bytes(d)])


def q4_k(x: np.ndarray) -> np.ndarray:
    """256 weights: 8 groups of 32 with 6-bit scales and minima, each with one fp16 scale; codes 0..15."""
    groups = x.reshape(8, 32, -1)
    searched = [search_affine(g, "Q4_K") for g in groups]
    ideal, ideal_min = (np.stack(values) for values in zip(*searched, strict=True))
    d, dmin = half_up(ideal.max(axis=0) / F(63)), half_up(ideal_min.max(axis=0) / F(63))
    inverse_d, inverse_dmin = inverse_of(d), inverse_of(dmin)
    scales, minima = np.zeros_like(ideal), np.zeros_like(ideal)
    codes = np.empty((8, 32, x.shape[1]), np.uint8)
    for g, group in enumerate(groups):
        best_error = np.full_like(d, np.inf)
        sum_x = ordered_sum(group)
        for delta in map(F, NEIGHBOURS):
            trial = codes_of(ideal[g], inverse_d, -np.inf, np.inf) + delta
            trial = np.minimum(np.maximum(trial, F(0)), F(63))
            scale = d * trial
            trial_min = codes_of(ideal_min[g], inverse_dmin, 0, 63)
            for _ in range(2):  # the second time with the best minimum for the first one's codes
                low = dmin * trial_min
                q = codes_of(group + low, inverse_of(scale), 0, 15)
                e = group - (q * scale - low)
                error = ordered_sum(e * e)
                better = error < best_error
                best_error = np.where(better, error, best_error)
                scales[g] = np.where(better, trial, scales[g])
                minima[g] = np.where(better, trial_min, minima[g])
                m = (scale * ordered_sum(q) - sum_x) / F(32)
                trial_min = codes_of(m, inverse_dmin, 0, 63)
        q = codes_of(group + dmin * minima[g], inverse_of(d * scales[g]), 0, 15)
        codes[g] = q.astype(np.uint8)
    return lay_q4_k(codes.reshape(256, -1), scales, minima, d, dmin)


def _lay_scales_and_minima(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Two of (8, blocks), 0..63, to uint8 (blocks, 12).

    Groups 0..3 have 6 bits of a byte each; groups 4..7 four bits in the last 4 bytes, two above those of the first.
    """
    s, m = scales.T.astype(np.uint8), minima.T.astype(np.uint8)  # (blocks, 8)
    first = [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6]
    return np.hstack([*first, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4])


def lay_q4_k(
    codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> np.ndarray:
    """Codes (256, blocks) of 0..15, integer scales and minima (8, blocks), d and dmin (blocks,) to uint8 (blocks, 144).

    Bytes: d, dmin, 12 of scales and minima, 128 of nibbles, groups 0 and 1 together, 2 and 3, ...
    """
    q = codes.reshape(8, 32, -1)
    nibbles = (q[0::2] | q[1::2] << 4).reshape(128, -1).T
    return np.hstack([half_bytes(d), half_bytes(dmin), _lay_scales_and_minima(scales, minima), nibbles])  # fmt: skip


def lay_q5_k(
    codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> np.ndarray:
    """As ``lay_q4_k`` with codes of 0..31, to uint8 (blocks, 176): the fifth bits, 32 bytes, stand before the nibbles.

    Bit g of byte k is of weight k of group g.
    """
    q = codes.reshape(8, 32, -1)
    fifth = np.zeros(q.shape[1:], np.uint8)
    for g in range(8):
        fifth |= q[g] >> 4 << g
    low = q & 15
    nibbles = (low[0::2] | low[1::2] << 4).reshape(128, -1).T
    scales_and_minima = _lay_scales_and_minima(scales, minima)
    return np.hstack([half_bytes(d), half_bytes(dmin), scales_and_minima, fifth.T, nibbles])


def lay_q3_k(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (256, blocks) of 0..7, integer scales (16, blocks) of -32..31 and d (blocks,) to uint8 (blocks, 110).

    Bytes: 32 of the codes' third bits (bit i of byte k: weight 32 i + k), 64 of their low pairs, 12 of scales plus 32 (low
    nibbles of 0..7 and 8..15 together, then high pairs of 0, 4, 8 and 12 together, 1, 5, ...), d.
    """
    rows = codes.reshape(8, 32, -1)
    third = np.zeros(rows.shape[1:], np.uint8)
    for i in range(8):
        third |= rows[i] >> 2 << i
    s = (scales.T.astype(np.int16) + 32).astype(np.uint8)  # (blocks, 16)
    low = s[:, :8] & 15 | (s[:, 8:] & 15) << 4
    high = s[:, :4] >> 4 | s[:, 4:8] >> 4 << 2 | s[:, 8:12] >> 4 << 4 | s[:, 12:] >> 4 << 6
    return np.hstack([third.T, _bit_pairs(codes & 3), low, high, half_bytes(d)])


def _bit_pairs(codes: np.ndarray) -> np.ndarray:
    """Codes (256, blocks) of 0..3 to uint8 (blocks, 64): k, k + 32, k + 64 and k + 96 of each half of 128 weights together."""
    q = codes.reshape(2, 4, 32, -1)
    return (q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6).reshape(64, -1).T


def lay_q2_k(
    codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> np.ndarray:
    """Codes (256, blocks) of 0..3, integer scales and minima (16, blocks) of 0..15, d and dmin (blocks,) to uint8 (blocks, 84).

    Bytes: 16 of scales and minima (high nibbles), 64 of codes as Q3_K's low pairs, d, dmin.
    """
    integers = scales.T.astype(np.uint8) | minima.T.astype(np.uint8) << 4
    return np.hstack([integers, _bit_pairs(codes), half_bytes(d), half_bytes(dmin)])


def lay_iq4_nl(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Indices (32, blocks) of IQ4_LEVELS and scales (blocks,) to uint8 (blocks, 18): d, nibbles as in Q4_0."""
    q = codes.T.astype(np.uint8)
    return np.hstack([half_bytes(d), q[:, :16] | q[:, 16:] << 4])


def lay_iq4_xs(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Indices (256, blocks) of IQ4_LEVELS, integer scales (8, blocks) of -32..31 and d (blocks,) to uint8 (blocks, 136).

    Bytes: d, two of high bit pairs of the scales plus 32, four of their low nibbles, 128 of codes, each group of 32 as in Q4_0.
    """
    s = (scales.T.astype(np.int16) + 32).astype(np.uint16)  # (blocks, 8)
    high = np.zeros(len(s), np.uint16)
    for g in range(8):
        high |= s[:, g] >> 4 << 2 * g
    low = (s[:, 0::2] & 15 | (s[:, 1::2] & 15) << 4).astype(np.uint8)
    q = codes.astype(np.uint8).reshape(8, 2, 16, -1)
    nibbles = (q[:, 0] | q[:, 1] << 4).reshape(128, -1).T
    return np.hstack([half_bytes(d), high.reshape(-1, 1).view(np.uint8), low, nibbles])
