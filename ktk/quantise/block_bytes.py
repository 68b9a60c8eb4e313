"""Codes and scales to the bytes of GGUF blocks, in NumPy. Source: the ggml block structures.

Every function takes arrays whose last axis is the blocks, and returns uint8 (blocks, bytes of a
block). ``lay_<type>`` takes codes, then, of types with integer multipliers, those and the numbers
they multiply; of others the scales.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.blocks import E2M1_LEVELS

F = np.float32


def half_bytes(scale: np.ndarray) -> np.ndarray:
    """uint8 (blocks, 2) of numbers that half precision holds."""
    return scale.astype(np.float16).reshape(-1, 1).view(np.uint8)


def lay_q8_0(q: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (32, blocks) of -127..127 and scales (blocks,) to uint8 (blocks, 34)."""
    return np.hstack([half_bytes(d), np.ascontiguousarray(q.T.astype(np.int8)).view(np.uint8)])


def lay_q4_0(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (32, blocks) of -8..7 and scales (blocks,) to uint8 (blocks, 18)."""
    q = (codes.T + F(8)).astype(np.uint8)
    return np.hstack([half_bytes(d), q[:, :16] | q[:, 16:] << 4])


def lay_mxfp4(levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Places (32, blocks) in E2M1_LEVELS and scales (blocks,) of these, powers of two,
    to uint8 (blocks, 17).
    """
    magnitudes = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7])
    values = np.array(E2M1_LEVELS)[levels]
    codes = magnitudes[np.abs(values)] + np.where(values < 0, 8, 0)
    exponent = scales.view(np.uint32) >> np.uint32(23)  # 2 ** (exponent - 127) doubled values
    return lay_e2m1(codes, np.where(scales == 0, 0, exponent + 1))


def lay_e2m1(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """e2m1 codes (32, blocks) and e8m0 exponents (blocks,) to uint8 (blocks, 17)."""
    code = codes.T.astype(np.uint8)
    return np.hstack([exponents.astype(np.uint8)[:, None], code[:, :16] | code[:, 16:] << 4])


def lay_q6_k(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes (256, blocks) of 0..63, integer scales (16, blocks) and d (blocks,) to uint8 (blocks,
    210).

    Bytes: 128 of low nibbles, 64 of high bit pairs, 16 scales, d. Each half of 128 weights has its
    nibbles in 64 bytes, k and k + 64 together, and its bit pairs in 32 bytes, k, k + 32, k + 64 and
    k + 96 together.
    """
    q = codes.reshape(2, 4, 32, -1)  # half, quarter of it, weight
    low = np.stack([q[:, 0] & 15 | (q[:, 2] & 15) << 4, q[:, 1] & 15 | (q[:, 3] & 15) << 4], axis=1)
    high = q[:, 0] >> 4 | q[:, 1] >> 4 << 2 | q[:, 2] >> 4 << 4 | q[:, 3] >> 4 << 6
    integers = np.ascontiguousarray(scales.T.astype(np.int8)).view(np.uint8)
    return np.hstack([low.reshape(128, -1).T, high.reshape(64, -1).T, integers, half_bytes(d)])


def _lay_scales_and_minima(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Two of (8, blocks), 0..63, to uint8 (blocks, 12).

    Groups 0..3 have 6 bits of a byte each; groups 4..7 four bits in the last 4 bytes, two above
    those of the first.
    """
    s, m = scales.T.astype(np.uint8), minima.T.astype(np.uint8)  # (blocks, 8)
    first = [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6]
    return np.hstack([*first, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4])


def lay_q4_k(
    codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> np.ndarray:
    """Codes (256, blocks) of 0..15, integer scales and minima (8, blocks), d and dmin (blocks,) to
    uint8 (blocks, 144).

    Bytes: d, dmin, 12 of scales and minima, 128 of nibbles, groups 0 and 1 together, 2 and 3, ...
    """
    q = codes.reshape(8, 32, -1)
    nibbles = (q[0::2] | q[1::2] << 4).reshape(128, -1).T
    return np.hstack(
        [half_bytes(d), half_bytes(dmin), _lay_scales_and_minima(scales, minima), nibbles]
    )


def lay_q5_k(
    codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> np.ndarray:
    """As ``lay_q4_k`` with codes of 0..31, to uint8 (blocks, 176): the fifth bits, 32 bytes, stand
    before the nibbles.

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
    """Codes (256, blocks) of 0..7, integer scales (16, blocks) of -32..31 and d (blocks,) to uint8
    (blocks, 110).

    Bytes: 32 of the codes' third bits (bit i of byte k: weight 32 i + k), 64 of their low pairs, 12
    of scales plus 32 (low nibbles of 0..7 and 8..15 together, then high pairs of 0, 4, 8 and 12
    together, 1, 5, ...), d.
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
    """Codes (256, blocks) of 0..3 to uint8 (blocks, 64): k, k + 32,
    k + 64 and k + 96 of each half of 128 weights together.
    """
    q = codes.reshape(2, 4, 32, -1)
    return (q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6).reshape(64, -1).T


def lay_q2_k(
    codes: np.ndarray, scales: np.ndarray, minima: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> np.ndarray:
    """Codes (256, blocks) of 0..3, integer scales and minima (16, blocks) of 0..15, d and dmin
    (blocks,) to uint8 (blocks, 84).

    Bytes: 16 of scales and minima (high nibbles), 64 of codes as Q3_K's low pairs, d, dmin.
    """
    integers = scales.T.astype(np.uint8) | minima.T.astype(np.uint8) << 4
    return np.hstack([integers, _bit_pairs(codes), half_bytes(d), half_bytes(dmin)])


def lay_iq4_nl(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Indices (32, blocks) of IQ4_LEVELS and scales (blocks,) to uint8 (blocks, 18): d,
    nibbles as in Q4_0.
    """
    q = codes.T.astype(np.uint8)
    return np.hstack([half_bytes(d), q[:, :16] | q[:, 16:] << 4])


def lay_iq4_xs(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Indices (256, blocks) of IQ4_LEVELS, integer scales (8, blocks) of -32..31 and d (blocks,) to
    uint8 (blocks, 136).

    Bytes: d, two of high bit pairs of the scales plus 32, four of their low nibbles, 128 of codes,
    each group of 32 as in Q4_0.
    """
    s = (scales.T.astype(np.int16) + 32).astype(np.uint16)  # (blocks, 8)
    high = np.zeros(len(s), np.uint16)
    for g in range(8):
        high |= s[:, g] >> 4 << 2 * g
    low = (s[:, 0::2] & 15 | (s[:, 1::2] & 15) << 4).astype(np.uint8)
    q = codes.astype(np.uint8).reshape(8, 2, 16, -1)
    nibbles = (q[:, 0] | q[:, 1] << 4).reshape(128, -1).T
    return np.hstack([half_bytes(d), high.reshape(-1, 1).view(np.uint8), low, nibbles])
