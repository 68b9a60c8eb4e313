"""The exact integer model of one projection: codes, group sums and the stated order of float sums.

With u the unsigned weight codes, z their zero point, a the signed activation codes:

    acc[f]  = sum_k a[k] * u[k] - z * sum_k a[k]           exact int32, one per fine group f
    inner   = fma over the fine groups of a coarse group, in order: acc * fine scale + inner
    y       = fma over the coarse groups, in order:                 inner * coarse scale + y

The fine group is the smaller of weight group and activation group and carries its own scale; where
they are equal the weight's scale is the fine one. Both sums start at +0. Every kernel does exactly
this, per output channel, whatever its vector width, so outputs agree bit for bit.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.fma import fma
from ktk.experts.layout import MatrixLayout
from ktk.experts.rows import QuantisedActivations


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


def linear_fine(
    values: np.ndarray,
    scales: np.ndarray,
    by: np.ndarray,
    act: QuantisedActivations,
    layout: MatrixLayout,
) -> np.ndarray:
    """float32 (rows, out) of weights of 4 bits, values float32 (out, padded_in), and activations
    rounded finely.

        acc     = sum_k a[k] * value[k]                       exact, over a group of the scales
        inner   = fma over the groups of an activation's 32:  acc * scale + inner
        y       = fma over them:                              inner * (activation's scale * by) + y

    scales float32 (out, groups of layout.fine_group); by float32 (out,): nvfp4's matrix's scale.
    """
    rows, out, fine = act.codes.shape[0], values.shape[0], layout.fine_group
    a = act.codes.astype(np.float64)
    y = np.zeros((rows, out), np.float32)
    for block, start in enumerate(range(0, layout.padded_in, layout.activation_group)):
        inner = np.zeros((rows, out), np.float32)
        for k in range(start, start + layout.activation_group, fine):
            acc = (a[:, k : k + fine] @ values[:, k : k + fine].T).astype(np.float32)  # exact
            inner = fma(acc, scales[None, :, k // fine], inner)
        y = fma(inner, act.scales[:, block, None] * by[None, :], y)
    return y


def linear_float(
    weights: np.ndarray, x: np.ndarray, scales: np.ndarray | None = None, group: int = 0
) -> np.ndarray:
    """float32 (rows, out) = x (rows, in) @ weights (out, in).T, one fma per k in order.

    scales : float32 (out, groups) of weights that have one for each ``group`` of k: one fma per
    group then multiplies its sum, which began at +0.
    """
    y = np.zeros((x.shape[0], weights.shape[0]), np.float32)
    for start in range(0, weights.shape[1], group or weights.shape[1]):
        inner = np.zeros_like(y)
        for k in range(start, min(start + (group or x.shape[1]), weights.shape[1])):
            inner = fma(x[:, k, None], weights[None, :, k], inner)
        y = inner if scales is None else fma(inner, scales[None, :, start // group], y)
    return y
