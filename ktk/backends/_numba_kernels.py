"""The kernels of the NUMBA backend on panel16, bit for bit those of the C rows.

Sixteen channels move in lockstep, so LLVM makes vectors of the inner loops. LLVM's fma is called as
an intrinsic: Numba has no fused multiply-add of its own, and the stated order of sums needs one.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

F = np.float32


@intrinsic
def fma(typingctx, a, b, c):
    """float32 a * b + c, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)

    def codegen(context, builder, sig, args):
        return builder.fma(*args)

    return signature, codegen


@numba.njit(nogil=True, cache=True, boundscheck=False)
def gemm_integer(panels, bits, scales, codes, act_scales, correction, group, act_group, out):
    """Rows against panels of int4 or int8 codes.

    panels uint8 (panels, panel_bytes); scales float32 (panels, groups, 16); codes int8 (rows,
    padded_in);
    act_scales float32 (rows, groups); correction int32 (rows, fine groups); out float32 (rows,
    panels, 16).
    """
    num_k = codes.shape[1]
    fine, coarse = min(group, act_group), max(group, act_group)
    weight_is_fine = group <= act_group
    acc = np.empty(16, np.int32)
    inner = np.empty(16, np.float32)
    y = np.empty(16, np.float32)
    for p in range(panels.shape[0]):
        for row in range(codes.shape[0]):
            a = codes[row]
            y[:] = F(0)
            f_index = 0
            for c in range(0, num_k, coarse):
                inner[:] = F(0)
                c_end = min(c + coarse, num_k)
                for f in range(c, c_end, fine):
                    f_end = min(f + fine, c_end)
                    acc[:] = correction[row, f_index]
                    if bits == 8:
                        for k in range(f, f_end, 4):
                            w = panels[p, k * 16 : k * 16 + 64]
                            a0, a1 = np.int32(a[k]), np.int32(a[k + 1])
                            a2, a3 = np.int32(a[k + 2]), np.int32(a[k + 3])
                            for n in range(16):
                                acc[n] += (
                                    np.int32(w[4 * n]) * a0
                                    + np.int32(w[4 * n + 1]) * a1
                                    + np.int32(w[4 * n + 2]) * a2
                                    + np.int32(w[4 * n + 3]) * a3
                                )
                    else:
                        for k in range(f, f_end, 8):
                            w = panels[p, k * 8 : k * 8 + 64]
                            for j in range(4):
                                low, high = np.int32(a[k + j]), np.int32(a[k + 4 + j])
                                for n in range(16):
                                    byte = np.int32(w[4 * n + j])
                                    acc[n] += (byte & 15) * low + (byte >> 4) * high
                    if weight_is_fine:
                        s = scales[p, f // group]
                        for n in range(16):
                            inner[n] = fma(F(acc[n]), s[n], inner[n])
                    else:
                        scale = act_scales[row, f_index]
                        for n in range(16):
                            inner[n] = fma(F(acc[n]), scale, inner[n])
                    f_index += 1
                if weight_is_fine:
                    scale = act_scales[row, c // act_group]
                    for n in range(16):
                        y[n] = fma(inner[n], scale, y[n])
                else:
                    s = scales[p, c // group]
                    for n in range(16):
                        y[n] = fma(inner[n], s[n], y[n])
            out[row, p, :] = y


@numba.njit(nogil=True, cache=True, boundscheck=False)
def gemm_fine(values, scales, by, fine, codes, act_scales, out):
    """Integers of 15 bits, and values of 4, whose sums over ``fine`` k are exact.

    values float32 (panels, padded_in, 16), scales (panels, groups of fine k, 16), by (16 * panels),
    codes float32 (rows, padded_in), act_scales (rows, groups), out (rows, panels, 16).
    """
    group = codes.shape[1] // act_scales.shape[1]
    acc = np.empty(16, np.float32)
    inner = np.empty(16, np.float32)
    y = np.empty(16, np.float32)
    for p in range(values.shape[0]):
        for row in range(codes.shape[0]):
            y[:] = F(0)
            for g in range(act_scales.shape[1]):
                inner[:] = F(0)
                for f in range(g * group, (g + 1) * group, fine):
                    acc[:] = F(0)
                    for k in range(f, f + fine):
                        a = codes[row, k]
                        for n in range(16):
                            acc[n] = fma(a, values[p, k, n], acc[n])
                    for n in range(16):
                        inner[n] = fma(acc[n], scales[p, f // fine, n], inner[n])
                scale = act_scales[row, g] * by[16 * p]
                for n in range(16):
                    y[n] = fma(inner[n], scale, y[n])
            out[row, p, :] = y


@numba.njit(nogil=True, cache=True, boundscheck=False)
def gemm_float(weights, scales, group, x, out):
    """weights float32 (panels, padded_in, 16), scales (panels, groups of k, 16), x float32 (rows,
    padded_in), out float32 (rows, panels, 16). No groups: nothing is scaled.
    """
    num_k = weights.shape[1]
    inner = np.empty(16, np.float32)
    y = np.empty(16, np.float32)
    for p in range(weights.shape[0]):
        for row in range(x.shape[0]):
            y[:] = F(0)
            for g in range(max(scales.shape[1], 1)):
                inner[:] = F(0)
                for k in range(g * group, min((g + 1) * group, num_k)):
                    a = x[row, k]
                    for n in range(16):
                        inner[n] = fma(a, weights[p, k, n], inner[n])
                if scales.shape[1]:
                    for n in range(16):
                        y[n] = fma(inner[n], scales[p, g, n], y[n])
            out[row, p, :] = y if scales.shape[1] else inner


@numba.njit(nogil=True, cache=True)
def _exp(x):
    x = F(-87.0) if F(-87.0) > x else x
    x = F(88.0) if F(88.0) < x else x
    if np.isnan(x):
        return x
    n = (x * F(1.44269504088896341) + F(12582912.0)) - F(12582912.0)
    r = fma(n, F(-0.693359375), x)
    r = fma(n, F(2.12194440e-4), r)
    p = fma(F(1.9875691500e-4), r, F(1.3981999507e-3))
    p = fma(p, r, F(8.3334519073e-3))
    p = fma(p, r, F(4.1665795894e-2))
    p = fma(p, r, F(1.6666665459e-1))
    p = fma(p, r, F(5.0000001201e-1))
    p = fma(p, r * r, r) + F(1.0)
    return p * F(2.0 ** np.float64(n))


@numba.njit(nogil=True, cache=True)
def activate(gate, up, kind, has_gate, alpha, gate_min, gate_max, up_min, up_max, up_offset, out):
    """Elementwise over float32 arrays of one shape; kind as in types.ACTIVATION_KINDS;
    gate unused without one.
    """
    for i in range(up.size):
        u = up.flat[i]
        x = gate.flat[i] if has_gate else u
        if kind == 0:
            if has_gate:
                x = gate_min if gate_min > x else x
                x = gate_max if gate_max < x else x
            h = x / (F(1.0) + _exp(-(alpha * x)))
        elif kind == 1:
            t = F(1.5957691216057308) * fma(F(0.044715) * (x * x), x, x)
            h = x / (F(1.0) + _exp(-t))
        else:
            positive = F(0.0) if F(0.0) > x else x
            h = positive * positive
        if has_gate:
            u = up_min if up_min > u else u
            u = up_max if up_max < u else u
            h = h * (u + up_offset)
        out.flat[i] = h


@numba.njit(nogil=True, cache=True)
def add_scaled(acc, y, weight):
    """acc = fma(y, weight, acc), float32 (n,)."""
    for i in range(acc.size):
        acc[i] = fma(y[i], weight, acc[i])
