"""Rows of activations on their way into a matrix and out of it, in NumPy,
with the bits of the C kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktk.experts.formats import FINE_MOST
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.rotation import NO_ROTATION, Rotation, rotate

# Below it most / amax overflows, and the group counts as zero.
TINY_AMAX = {127: np.float32(1.5e-36), FINE_MOST: np.float32(3.5e-34)}


@dataclass(frozen=True)
class QuantisedActivations:
    """codes int8 or int16 (rows, padded_in); scales float32 (rows, groups of activation_group)."""

    codes: np.ndarray
    scales: np.ndarray


def quantise_activations(
    x: np.ndarray, padded_in: int, group: int, rotation: Rotation = NO_ROTATION, most: int = 127
) -> QuantisedActivations:
    """float32 (rows, in_features), rotated, to integer codes in groups along in_features.

    most : 127, codes are int8, or FINE_MOST, int16.
    scale = amax / most; code = round-half-even(x * (most / amax)). A group holding NaN or inf gets
    scale NaN, so its row's outputs are NaN; an all-zero group gets scale 0.
    """
    rows, in_features = x.shape
    padded = np.zeros((rows, padded_in), np.float32)
    padded[:, :in_features] = x
    padded = np.ascontiguousarray(rotate(padded, rotation))
    starts = np.arange(0, padded_in, group)
    magnitude = np.maximum.reduceat(padded.view(np.uint32) & np.uint32(0x7FFFFFFF), starts, axis=1)
    is_finite = magnitude < np.uint32(0x7F800000)
    amax = magnitude.view(np.float32)
    usable = is_finite & (amax >= TINY_AMAX[most])
    with np.errstate(all="ignore"):
        inverse = np.where(usable, np.float32(most) / amax, np.float32(0.0))
        scales = np.where(usable, amax / np.float32(most), np.float32(0.0))
        scales = np.where(is_finite, scales, np.float32(np.nan))
        spread = np.repeat(inverse, group, axis=1)[:, :padded_in]
        codes = np.where(spread == 0, np.float32(0.0), np.rint(padded * spread))
        codes = codes.astype(np.int8 if most == 127 else np.int16)
    return QuantisedActivations(codes, scales)


def poison_rows(x: np.ndarray) -> np.ndarray:
    """Rows of float32 (rows, n) that hold NaN or inf become NaN throughout:
    inf must not be clamped to a number.
    """
    finite = np.isfinite(x).all(axis=1, keepdims=True)
    return x if finite.all() else np.where(finite, x, np.float32(np.nan))


def store_rows(y: np.ndarray, out: np.ndarray) -> None:
    """float32 (rows, n) into float32, float16 or bf16 bits, rounded once."""
    with np.errstate(over="ignore"):
        out[:] = f32_to_bf16(y) if out.dtype == np.uint16 else y.astype(out.dtype)
