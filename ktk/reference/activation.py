"""Exact float32 model of the activation functions: the same operations, in the same order,
as the C.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.activation import Activation
from ktk.experts.fma import fma

F = np.float32
EXP_MIN, EXP_MAX = F(-87.0), F(88.0)
LOG2E = F(1.44269504088896341)
LN2_HI, LN2_LO = F(0.693359375), F(-2.12194440e-4)
# Degree-6 polynomial of exp on [-ln2/2, ln2/2]; coefficients of Cephes expf (S. Moshier).
EXP_COEFFICIENTS = tuple(
    F(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
GELU_C0, GELU_C1 = F(1.5957691216057308), F(0.044715)  # 2*sqrt(2/pi)
ROUND_MAGIC = F(12582912.0)  # 1.5 * 2**23: adding and subtracting rounds half to even below 2**22


def _clamp(x: np.ndarray, low: np.float32, high: np.float32) -> np.ndarray:
    """minps(high, maxps(low, x)): a NaN in x stays."""
    x = np.where(low > x, low, x)
    return np.where(high < x, high, x)


def exp(x: np.ndarray) -> np.ndarray:
    """exp of float32 clamped to [-87, 88]; within 2 ulp; NaN stays NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        x = _clamp(np.asarray(x, F), EXP_MIN, EXP_MAX)
        n = (x * LOG2E + ROUND_MAGIC) - ROUND_MAGIC
        r = fma(n, -LN2_HI, x)
        r = fma(n, -LN2_LO, r)
        p = np.full_like(x, EXP_COEFFICIENTS[0])
        for c in EXP_COEFFICIENTS[1:]:
            p = fma(p, r, c)
        p = fma(p, r * r, r) + F(1.0)
        power = np.where(np.isnan(n), 0, n).astype(np.int32) + np.int32(127)
        return p * (power << np.int32(23)).view(F)


def activate(gate: np.ndarray | None, up: np.ndarray, act: Activation) -> np.ndarray:
    """float32 (...) gate (None without a gate projection) and up to float32 (...)."""
    with np.errstate(all="ignore"):
        x = up if gate is None else gate
        if act.kind == "sigmoid_glu":
            if gate is not None:
                x = _clamp(x, F(act.gate_min), F(act.gate_max))
            h = x / (F(1.0) + exp(-(F(act.alpha) * x)))
        elif act.kind == "gelu_tanh":
            u = GELU_C0 * fma(GELU_C1 * (x * x), x, x)
            h = x / (F(1.0) + exp(-u))
        else:
            positive = np.where(F(0.0) > x, F(0.0), x)
            h = positive * positive
        if gate is None:
            return h
        return h * (_clamp(up, F(act.up_min), F(act.up_max)) + F(act.up_offset))
