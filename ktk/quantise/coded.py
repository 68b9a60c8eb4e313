"""Float weights to formats of checkpoints: codes of few bits with a scale a block, where a
checkpoint has none to keep. A block's largest weight becomes the largest code.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.floats import as_bits, as_values, largest_of, nearest_codes
from ktk.experts.layout import MatrixLayout
from ktk.experts.stored import CodedMatrix

F = np.float32
_SMALLEST = F(1e-37)  # of a scale that can be divided by


def quantise_coded(w: np.ndarray, layout: MatrixLayout) -> CodedMatrix:
    """Finite float32 (out, in) to the codes and scales of a format without a search.

    Blocks of zeros have the scale 0, or the smallest one there is.
    """
    fmt = layout.format
    assert fmt.scales is not None
    block = min(fmt.scales.rows, len(w)), min(layout.group_size, w.shape[1])
    if fmt.has_zero_points:
        return _with_zero_points(w, layout, block)
    blocks = _in_blocks(w, block)
    largest = F(largest_of(fmt.codes.dtype))
    scales = (np.abs(blocks).max(axis=(1, 3)) / largest).astype(F)
    tensor_scale = F(1)
    if fmt.has_tensor_scale:
        tensor_scale = max(scales.max() / F(largest_of(fmt.scales.dtype)), _SMALLEST)
    if fmt.scales.dtype == "e8m0":  # the next power of two: no weight is cut off
        scales = np.exp2(np.ceil(np.log2(np.maximum(scales, F(2.0**-126))))).astype(F)
    else:
        bits = as_bits(scales / tensor_scale, fmt.scales.dtype)
        scales = as_values(bits, fmt.scales.dtype)
    each = scales * tensor_scale
    inverse = np.divide(F(1), each, out=np.zeros_like(each), where=each > _SMALLEST)
    codes = nearest_codes(blocks * inverse[:, None, :, None], fmt.codes.dtype)
    scales = np.where(inverse > 0, scales, F(0) if fmt.scales.dtype != "e8m0" else scales)
    return CodedMatrix(_whole(codes, w), scales, fmt, block, float(tensor_scale))


def _with_zero_points(w: np.ndarray, layout: MatrixLayout, block: tuple[int, int]) -> CodedMatrix:
    """16 steps from a group's least weight, or 0, to its largest, or 0."""
    fmt, blocks = layout.format, _in_blocks(w, block)
    assert fmt.scales is not None
    least = np.minimum(blocks.min(axis=(1, 3)), F(0))
    most = np.maximum(blocks.max(axis=(1, 3)), F(0))
    scales = as_values(as_bits((most - least) / F(15), fmt.scales.dtype), fmt.scales.dtype)
    scales = np.where(np.isfinite(scales), scales, F(65504))
    inverse = np.divide(F(1), scales, out=np.zeros_like(scales), where=scales > 0)
    zeros = nearest_codes(-least * inverse, "u4")
    codes = np.rint(blocks * inverse[:, None, :, None]) + zeros[:, None, :, None]
    codes = np.clip(codes, 0, 15).astype(np.uint8)
    return CodedMatrix(_whole(codes, w), scales, fmt, block, zero_points=zeros)


def _in_blocks(w: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """(blocks of rows, rows, blocks of columns, columns), filled up with zeros."""
    high, wide = block
    rows, columns = -(-w.shape[0] // high), -(-w.shape[1] // wide)
    whole = np.zeros((rows * high, columns * wide), F)
    whole[: w.shape[0], : w.shape[1]] = w
    return whole.reshape(rows, high, columns, wide)


def _whole(codes: np.ndarray, w: np.ndarray) -> np.ndarray:
    rows, high, columns, wide = codes.shape
    return codes.reshape(rows * high, columns * wide)[: w.shape[0], : w.shape[1]]
