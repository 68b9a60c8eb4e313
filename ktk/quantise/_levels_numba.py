"""Kernels of ``ktk.quantise.levels``: the scale of a channel, and columns rounded to levels.

LANES rows (output channels) in lockstep, as in ``_feedback_numba``; run without the GIL.
"""

from __future__ import annotations

import numba
import numpy as np

from ktk.quantise._feedback_numba import CONTRACT, LANES, ONE, ZERO, code_columns


@numba.njit(nogil=True, cache=True)
def _nearest_magnitude(x, k0, k1, scale, magnitudes, largest, at):
    """at (LANES,): the magnitude whose largest product is nearest to each lane's largest value."""
    for n in range(LANES):
        at[n] = ZERO
    for k in range(k0, k1):
        for n in range(LANES):
            at[n] = max(at[n], abs(x[k, n]))
    for n in range(LANES):
        at[n] = ZERO if scale[n] == ZERO else at[n] / (scale[n] * largest)
    for n in range(LANES):
        wanted, place = at[n], ZERO
        for i in range(magnitudes.shape[0] - 1):
            middle = np.float32(0.5) * (magnitudes[i] + magnitudes[i + 1])
            place += ONE if wanted > middle else ZERO
        at[n] = place


@numba.njit(nogil=True, cache=True)
def _step(scale, magnitudes, at, away, sign, step):
    """step (LANES,): scale times the magnitude ``away`` from the one at ``at``, with a sign."""
    last = magnitudes.shape[0] - 1
    for n in range(LANES):
        place = min(max(np.int64(at[n]) + away, 0), last)
        step[n] = scale[n] * magnitudes[place] * sign


@numba.njit(nogil=True, cache=True, fastmath=CONTRACT)
def levels_loss(x, weight, group, stride, scale, magnitudes, signs, table, loss):
    """loss (LANES,) of rows rounded to scale * multiplier * level without feedback, of every
    stride-th group, each with the nearest magnitude or the one above, and the better sign. scale :
    (LANES,).
    """
    at = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    step = np.empty(LANES, np.float32)
    level = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    largest = max(abs(table[0]), abs(table[-1]))
    loss[:] = ZERO
    for k0 in range(0, x.shape[0], group * stride):
        best[:] = np.inf
        _nearest_magnitude(x, k0, k0 + group, scale, magnitudes, largest, at)
        for trial in range(2 * signs.shape[0]):
            _step(scale, magnitudes, at, trial % 2, signs[trial // 2], step)
            for n in range(LANES):
                inverse[n] = ZERO if step[n] == ZERO else ONE / step[n]
                error[n] = ZERO
            for k in range(k0, k0 + group):
                level[:] = table[0]
                for i in range(table.shape[0] - 1):
                    rise = table[i + 1] - table[i]
                    middle = np.float32(0.5) * (table[i + 1] + table[i])
                    for n in range(LANES):
                        level[n] += rise if x[k, n] * inverse[n] > middle else ZERO
                for n in range(LANES):
                    rest = x[k, n] - level[n] * step[n]
                    error[n] += weight[k] * (rest * rest)
            for n in range(LANES):
                best[n] = min(best[n], error[n])
        for n in range(LANES):
            loss[n] += best[n]


@numba.njit(nogil=True, cache=True)
def round_levels(
    x, target, u, weight, group, scale, magnitudes, signs, table, codes, chosen, error, loss
):
    """Round columns to scale * multiplier * level, the multiplier of least loss for each group: of
    the magnitude nearest to the group's largest value, the one below and two above, with each sign.
    Others win so rarely that it cannot be seen in the error of normal weights.

    scale : (rows,). codes int16 (columns, rows), chosen uint8 (groups, rows), indices of all
    magnitudes with the first sign, then with the second, and error are written; loss (rows,) is
    added to.
    """
    num_k, num_rows = x.shape
    work = np.empty((3, num_k, LANES), np.float32)
    t, e, q = work[0], work[1], work[2]
    best_e = np.empty((num_k, LANES), np.float32)
    best_q = np.empty((num_k, LANES), np.float32)
    xs = np.empty((num_k, LANES), np.float32)
    a = np.empty((num_k, LANES), np.float32)
    lane_scale = np.empty(LANES, np.float32)
    step = np.empty(LANES, np.float32)
    low = np.zeros(LANES, np.float32)
    at = np.empty(LANES, np.float32)
    trial = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    index = np.empty(LANES, np.uint8)
    count = magnitudes.shape[0]
    below, above = (1, 2) if count > 1 else (0, 0)
    largest = max(abs(table[0]), abs(table[-1]))
    for row in range(0, num_rows, LANES):
        for k in range(num_k):
            for n in range(LANES):
                xs[k, n] = x[k, row + n]
                a[k, n] = target[k, row + n]
        for n in range(LANES):
            lane_scale[n] = scale[row + n]
        for g in range(num_k // group):
            k0, k1 = g * group, (g + 1) * group
            best[:] = np.inf
            index[:] = 0
            _nearest_magnitude(a, k0, k1, lane_scale, magnitudes, largest, at)
            for sign_at in range(signs.shape[0]):
                for away in range(-below, above + 1):
                    _step(lane_scale, magnitudes, at, away, signs[sign_at], step)
                    code_columns(
                        xs, a, u, weight, k0, k1, step, low, ZERO, ZERO, table, t, e, q, trial
                    )
                    is_first = sign_at == 0 and away == -below
                    for n in range(LANES):
                        if trial[n] < best[n] or is_first:
                            best[n] = trial[n]
                            place = min(max(np.int64(at[n]) + away, 0), count - 1)
                            index[n] = place + sign_at * count
                            for k in range(k0, k1):
                                best_e[k, n] = e[k, n]
                                best_q[k, n] = q[k, n]
            for n in range(LANES):
                chosen[g, row + n] = index[n]
                loss[row + n] += best[n]
            for k in range(k0, k1):
                for n in range(LANES):
                    codes[k, row + n] = np.int16(best_q[k, n])
                    error[k, row + n] = best_e[k, n]
                for j in range(k1, num_k):
                    f = u[k, j]
                    if f != ZERO:
                        for n in range(LANES):
                            a[j, n] += best_e[k, n] * f
