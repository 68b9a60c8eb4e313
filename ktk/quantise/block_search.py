"""Float weights to GGUF blocks: which codes and scales, in NumPy; ``_block_search_numba`` is the
twin that runs.

Every function takes x, float32 (weights of a block, blocks), and returns uint8 (blocks, bytes of a
block). All blocks go in lockstep and sums run over the weights in order, so that the twins give the
same bytes. The oracle of both is the gguf package, which decodes what they write.

Each searches its scales for the least squared error: candidates from a ladder of code ranges, then
the scale that fits the codes found; scales that are stored as small integers are chosen among the
neighbours of the ideal one, judged with the very numbers a reader decodes. Errors are not weighted:
on groups of 32 that gave no lower KL (bench/RESULTS.md, Accuracy).
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats import BLOCKS
from ktk.experts.formats.blocks import NEIGHBOURS
from ktk.quantise.block_bytes import lay_e2m1, lay_q4_0, lay_q4_k, lay_q6_k, lay_q8_0

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


def _ladder(name: str) -> tuple[np.ndarray, int]:
    """What is tried for a type's scales, float32 (candidates,), and the refits."""
    search = BLOCKS[name].search
    assert search is not None
    return np.array(search.ladder, F), search.refits


def search_signed(x: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """Scale of least squared error of each column with codes low..high,
    of the type called ``name``.
    """
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
    """Scale and subtracted minimum, both 0 or more,
    of least squared error of each column with codes 0..15.
    """
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


def q4_0(x: np.ndarray) -> np.ndarray:
    """fp16 scale of either sign, 32 codes of -8..7, plus 8; the first 16 in low nibbles."""
    d = search_signed(x, "Q4_0", -8, 7).astype(np.float16).astype(F) + F(0)
    return lay_q4_0(codes_of(x, inverse_of(d), -8, 7), d)


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
    return lay_e2m1(code, np.where(peak == 0, 0, best))


def q6_k(x: np.ndarray) -> np.ndarray:
    """256 weights: 16 groups of 16 with int8 scales and one fp16 scale of scales;
    codes -32..31, plus 32.
    """
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


def q4_k(x: np.ndarray) -> np.ndarray:
    """256 weights: 8 groups of 32 with 6-bit scales and minima, each with one fp16 scale;
    codes 0..15.
    """
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
