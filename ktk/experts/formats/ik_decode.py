"""The types of ik_llama.cpp's GGUF files, decoded by NumPy: the reference of their kernels.

A weight is (d * multiplier) * value in float32. d is the scale of a block, or of a whole row, which
then stands before the row's blocks. Multipliers are integers, one for 16 or 32 weights. Values are
integers, too: codes look them up in a table, or a trellis makes them.
Source: the block structures, value tables and dequantisers of ik_llama.cpp (ggml-common.h,
iqk_quantize.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ktk.experts.formats.base import NUMPY_FLOATS, Format

WEIGHTS = 256  # of a block
# Values of codes. A group whose bit is set takes each of them plus the type's shift.
TWO_BIT = (-31, -13, 1, 17)
THREE_BIT = (-63, -40, -23, -10, 1, 13, 28, 47)
FOUR_BIT = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FIVE_BIT = (
    *(-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6),
    *(-1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121),
)
SIX_BIT = (
    *(-127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54),
    *(-51, -47, -44, -40, -37, -34, -31, -28, -25, -22, -19, -16, -13, -11, -8, -5),
    *(-2, 0, 3, 6, 9, 12, 14, 17, 20, 23, 27, 30, 33, 36, 40, 44),
    *(47, 51, 55, 59, 63, 68, 72, 77, 82, 87, 92, 98, 103, 109, 115, 121),
)
# Of IQ2_KL: what two neighbours are that share a code.
PAIRS = (
    *((-63, -23), (-63, 13), (-40, -63), (-40, -10), (-40, 13), (-40, 47), (-23, -40), (-23, -23)),
    *((-23, 1), (-23, 13), (-23, 28), (-10, -63), (-10, 1), (-10, 13), (-10, 47), (1, -23)),
    *((1, -10), (1, 1), (1, 13), (1, 28), (13, -40), (13, -23), (13, -10), (13, 1)),
    *((13, 13), (28, -63), (28, -23), (28, 1), (28, 28), (28, 47), (47, -23), (47, 13)),
)
# The trellis: a state, which an index begins, is multiplied for each weight; the weight is the sum
# of the low six bits of its bytes, less 126.
TRELLIS_FACTOR = 0xCBAC1FED
TRELLIS_OFFSET = 4096
TRELLIS_ZERO = 126


class Decoded(NamedTuple):
    """Blocks taken apart: int32 multipliers (blocks, groups) and values (blocks, 256)."""

    multipliers: np.ndarray
    values: np.ndarray


def decode(fmt: Format, rows: np.ndarray) -> np.ndarray:
    """Rows of a type of ``DECODERS``, uint8 (..., row bytes), as float32 (..., in_features)."""
    flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
    head = fmt.row_head
    blocks = np.ascontiguousarray(flat[:, head:]).reshape(-1, fmt.block_bytes)
    found = DECODERS[fmt.name](blocks)
    if fmt.row_scale:
        scales = _words(flat[:, :head], NUMPY_FLOATS[fmt.row_scale])
        scales = np.repeat(scales, len(blocks) // len(flat), 0)
    else:
        scales = _words(blocks[:, :2], "<f2")
    groups = found.multipliers.shape[1]
    factors = scales.astype(np.float32) * found.multipliers.astype(np.float32)  # (blocks, groups)
    values = found.values.reshape(len(blocks), groups, -1).astype(np.float32)
    return (factors[:, :, None] * values).reshape(*rows.shape[:-1], -1)


def _words(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of blocks as wider integers, or as halves, (blocks, words)."""
    return np.ascontiguousarray(raw).view(dtype)


def _bits(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """int32 (blocks, words * count): ``count`` fields of ``width`` bits a word, lowest first."""
    shifts = np.arange(count, dtype=np.uint32) * width
    fields = words[..., None].astype(np.uint32) >> shifts & ((1 << width) - 1)
    return fields.reshape(len(words), -1).astype(np.int32)


def _planes(raw: np.ndarray, span: int, width: int) -> np.ndarray:
    """Codes of ``width`` bits, int32 (blocks, weights): of each ``span`` bytes the lowest bits are
    ``span`` weights, the next ones the next ``span``, and so on.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    codes = raw.reshape(len(raw), -1, 1, span) >> shifts & ((1 << width) - 1)
    return codes.reshape(len(raw), -1).astype(np.int32)


def _look_up(
    table: tuple[int, ...], codes: np.ndarray, shift: int, shifted: np.ndarray
) -> np.ndarray:
    """The codes' values, int32 (blocks, 256); ``shifted`` (blocks, groups) says of which groups
    they are larger by ``shift``.
    """
    values = np.array(table, np.int32)[codes].reshape(*shifted.shape, -1)
    return (values + shift * shifted[:, :, None]).reshape(len(codes), -1)


def _extra(blocks: np.ndarray, at: int = 2) -> np.ndarray:
    """Sixteen bits, one for each 16 weights."""
    return _bits(_words(blocks[:, at : at + 2], "<u2"), 1, 16)


def _iq2_k(blocks: np.ndarray) -> Decoded:
    multipliers = _bits(blocks[:, 4:12], 4, 2) - 8
    codes = _planes(blocks[:, 12:76], 32, 2)
    return Decoded(multipliers, _look_up(TWO_BIT, codes, 5, _extra(blocks)))


def _iq3_k(blocks: np.ndarray) -> Decoded:
    odd = 2 * _bits(blocks[:, 6:14], 4, 2) + 1
    multipliers = odd * (1 - 2 * _extra(blocks, 4))
    codes = _planes(blocks[:, 14:78], 32, 2) | _planes(blocks[:, 78:110], 32, 1) << 2
    return Decoded(multipliers, _look_up(THREE_BIT, codes, 4, _extra(blocks)))


def _six_bit_multipliers(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return (_bits(low, 4, 2) | _bits(high, 2, 4) << 4) - 32


def _iq4_k(blocks: np.ndarray) -> Decoded:
    multipliers = _six_bit_multipliers(blocks[:, 4:8], blocks[:, 8:16])
    codes = _planes(blocks[:, 16:144], 16, 4)
    return Decoded(multipliers, _look_up(FOUR_BIT, codes, 4, _extra(blocks)))


def _iq5_k(blocks: np.ndarray) -> Decoded:
    multipliers = _six_bit_multipliers(blocks[:, 4:8], blocks[:, 8:16])
    codes = _planes(blocks[:, 16:144], 32, 4) | _planes(blocks[:, 144:176], 32, 1) << 4
    return Decoded(multipliers, _look_up(FIVE_BIT, codes, 2, _extra(blocks)))


def _iq6_k(blocks: np.ndarray) -> Decoded:
    multipliers = blocks[:, 4:20].view(np.int8).astype(np.int32)
    codes = _planes(blocks[:, 20:148], 32, 4) | _planes(blocks[:, 148:212], 32, 2) << 4
    return Decoded(multipliers, _look_up(SIX_BIT, codes, 1, _extra(blocks)))


def _seven_bit(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(multipliers, whether values are shifted) of bytes, (blocks, groups) each."""
    whole = scales.astype(np.int32)
    return (whole & 254) - 127, whole & 1


def _iq4_ks(blocks: np.ndarray) -> Decoded:
    multipliers, shifted = _seven_bit(blocks[:, :8])
    codes = _planes(blocks[:, 8:136], 16, 4)
    return Decoded(multipliers, _look_up(FOUR_BIT, codes, 4, shifted))


def _iq5_ks(blocks: np.ndarray) -> Decoded:
    multipliers, shifted = _seven_bit(blocks[:, :8])
    codes = _planes(blocks[:, 8:136], 32, 4) | _planes(blocks[:, 136:168], 32, 1) << 4
    return Decoded(multipliers, _look_up(FIVE_BIT, codes, 2, shifted))


def _iq4_kss(blocks: np.ndarray) -> Decoded:
    # Of each eight words the lowest bits make up a scale; the other fifteen are a Gray code.
    words = _words(blocks, "<u2")
    scales = np.packbits(words.astype(np.uint8) & 1, 1, "little")
    multipliers, shifted = _seven_bit(scales)
    gray = words & 0xFFFE
    codes = _planes((gray ^ gray >> 1).view(np.uint8), 16, 4)
    return Decoded(multipliers, _look_up(FOUR_BIT, codes, 4, shifted))


def _iq2_ks(blocks: np.ndarray) -> Decoded:
    extra = _extra(blocks, 0)
    multipliers = (_bits(blocks[:, 2:6], 4, 2) | extra[:, 8:] << 4) - 16
    codes = _planes(blocks[:, 6:70], 32, 2)
    return Decoded(multipliers, _look_up(TWO_BIT, codes, 5, extra[:, :8]))


def _iq3_ks(blocks: np.ndarray) -> Decoded:
    extra = _extra(blocks, 0)
    multipliers = (_planes(blocks[:, 2:6], 4, 4) | extra[:, :8] << 4) - 16
    codes = _planes(blocks[:, 6:70], 32, 2) | _planes(blocks[:, 70:102], 32, 1) << 2
    return Decoded(multipliers, _look_up(THREE_BIT, codes, 4, extra[:, 8:]))


def _iq2_kl(blocks: np.ndarray) -> Decoded:
    high = _bits(_words(blocks[:, :2], "<u2"), 2, 8)
    multipliers = (_planes(blocks[:, 2:6], 4, 4) | high << 4) - 32
    codes = _planes(blocks[:, 6:70], 16, 4) | _planes(blocks[:, 70:86], 16, 1) << 4
    return Decoded(multipliers, np.array(PAIRS, np.int32)[codes].reshape(-1, WEIGHTS))


def _trellis(indices: np.ndarray, steps: int, offset: int | np.ndarray = 0) -> np.ndarray:
    """int32 (blocks, indices * steps)."""
    state = indices.astype(np.uint32) + np.uint32(TRELLIS_OFFSET) + np.asarray(offset, np.uint32)
    values = np.empty((*indices.shape, steps), np.int32)
    for step in range(steps):
        state = state * np.uint32(TRELLIS_FACTOR)
        six = np.ascontiguousarray(state & np.uint32(0x3F3F3F3F)).view(np.uint8)
        values[..., step] = six.reshape(*state.shape, 4).sum(-1, dtype=np.int32) - TRELLIS_ZERO
    return values.reshape(len(indices), -1)


def _iq1_kt(blocks: np.ndarray) -> Decoded:
    multipliers = np.array(FOUR_BIT, np.int32)[blocks[:, :8] & 15]
    low, high = blocks[:, 8:40].astype(np.int32), _planes(blocks[:, 40:56], 16, 4)
    top = _bits(blocks[:, :8] >> 4, 1, 4)
    return Decoded(multipliers, _trellis(low | high << 8 | top << 12, 8))


def _iq2_kt(blocks: np.ndarray) -> Decoded:
    multipliers = np.array(FOUR_BIT, np.int32)[_planes(blocks[:, :4], 4, 4)]
    return Decoded(multipliers, _trellis(_words(blocks[:, 4:68], "<u2"), 8))


def _iq3_kt(blocks: np.ndarray) -> Decoded:
    multipliers = _planes(blocks[:, :4], 4, 4)
    values = np.abs(_trellis(_words(blocks[:, 4:68], "<u2"), 8))
    return Decoded(multipliers, values * (1 - 2 * _planes(blocks[:, 68:100], 32, 1)))


def _iq4_kt(blocks: np.ndarray) -> Decoded:
    words = _words(blocks[:, :32], "<u4")
    multipliers = (words.astype(np.int32) >> 1 & 127) - 64
    low, high = blocks[:, 32:96].astype(np.int32), _planes(blocks[:, 96:128], 32, 4)
    top = _bits(words >> 8, 3, 8)
    offset = np.repeat(words & 1, 8, 1) << 15
    return Decoded(multipliers, _trellis(low | high << 8 | top << 12, 4, offset))


DECODERS: dict[str, Callable[[np.ndarray], Decoded]] = {
    "IQ1_KT": _iq1_kt,
    "IQ2_KT": _iq2_kt,
    "IQ2_KS": _iq2_ks,
    "IQ2_K": _iq2_k,
    "IQ2_KL": _iq2_kl,
    "IQ3_KT": _iq3_kt,
    "IQ3_KS": _iq3_ks,
    "IQ3_K": _iq3_k,
    "IQ4_KT": _iq4_kt,
    "IQ4_KSS": _iq4_kss,
    "IQ4_KS": _iq4_ks,
    "IQ4_K": _iq4_k,
    "IQ5_KS": _iq5_ks,
    "IQ5_K": _iq5_k,
    "IQ6_K": _iq6_k,
}
