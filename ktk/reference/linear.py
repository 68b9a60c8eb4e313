"""The exact integer model of one projection: codes, group sums and the stated order of float sums.

With u the unsigned weight codes, z their zero point, a the signed activation codes:

    acc[f]  = sum_k a[k] * u[k] - z * sum_k a[k]           exact int32, one per fine group f
    inner   = fma over the fine groups of a coarse group, in order: acc * fine scale + inner
    y       = fma over the coarse groups, in order:                 inner * coarse scale + y

The fine group is the smaller of weight group and activation group and carries its own scale; where
they are equal the weight's scale is the fine one. Both sums start at +0. Every kernel does exactly this,
per output channel, whatever its vector width, so outputs agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktk.experts.layout import MatrixLayout
from ktk.reference.fma import fma

TINY_AMAX = np.float32(1.5e-36)  # below it 127 / amax overflows: the group counts as zero


@dataclass(frozen=True)
class QuantisedActivations:
    """codes int8 (rows, padded_in); scales float32 (rows, groups of activation_group)."""

    codes: np.ndarray
    scales: np.ndarray


def quantise_activations(x: np.ndarray, padded_in: int, group: int) -> QuantisedActivations:
    """float32 (rows, in_features) to int8 codes in groups along in_features.

    scale = amax / 127; code = round-half-even(x * (127 / amax)). A group holding NaN or inf gets scale NaN,
    so its row's outputs are NaN; an all-zero group gets scale 0.
    """
    rows, in_features = x.shape
    padded = np.zeros((rows, padded_in), np.float32)
    padded[:, :in_features] = x
    starts = np.arange(0, padded_in, group)
    magnitude = np.maximum.reduceat(padded.view(np.uint32) & np.uint32(0x7FFFFFFF), starts, axis=1)
    is_finite = magnitude < np.uint32(0x7F800000)
    amax = magnitude.view(np.float32)
    usable = is_finite & (amax >= TINY_AMAX)
    with np.errstate(all="ignore"):
        inverse = np.where(usable, np.float32(127.0) / amax, np.float32(0.0))
        scales = np.where(usable, amax / np.float32(127.0), np.float32(0.0))
        scales = np.where(is_finite, scales, np.float32(np.nan))
        spread = np.repeat(inverse, group, axis=1)[:, :padded_in]
        codes = np.where(spread == 0, np.float32(0.0), np.rint(padded * spread)).astype(np.int8)
    return QuantisedActivations(codes, scales)


def linear_integer(
    codes: np.ndarray,
    scales: np.ndarray,
    act: QuantisedActivations,
    layout: MatrixLayout,
    zero_point: int,
) -> np.ndarray:
    """float32 (rows, out): codes uint8 (out, padded_in), scales float32 (out, num_groups)."""
    rows, out = act.codes.shape[0], codes.shape[0]
    k_total, fine = layout.padded_in, layout.fine_group
    coarse = max(layout.group_size, layout.activation_group)
    weight_is_fine = layout.group_size <= layout.activation_group
    signed = (codes.astype(np.int32) - zero_point).astype(np.float64)  # exact: |sums| < 2**53
    a = act.codes.astype(np.float64)
    y = np.zeros((rows, out), np.float32)
    for c0 in range(0, k_total, coarse):
        inner = np.zeros((rows, out), np.float32)
        for f0 in range(c0, min(c0 + coarse, k_total), fine):
            f1 = min(f0 + fine, k_total)
            acc = (a[:, f0:f1] @ signed[:, f0:f1].T).astype(np.float32)  # exact: < 2**24
            weight_scale = scales[None, :, f0 // layout.group_size]
            act_scale = act.scales[:, f0 // layout.activation_group, None]
            inner = fma(acc, weight_scale if weight_is_fine else act_scale, inner)
        weight_scale = scales[None, :, c0 // layout.group_size]
        act_scale = act.scales[:, c0 // layout.activation_group, None]
        y = fma(inner, act_scale if weight_is_fine else weight_scale, y)
    return y


def linear_float(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float32 (rows, out) = x (rows, in) @ weights (out, in).T, one fma per k in order."""
    y = np.zeros((x.shape[0], weights.shape[0]), np.float32)
    for k in range(weights.shape[1]):
        y = fma(x[:, k, None], weights[None, :, k], y)
    return y
