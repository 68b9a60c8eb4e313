"""Kernels of ``ktk.quantise.levels``: columns as rows, the scale of a channel, columns rounded.

LANES rows (output channels) in lockstep, as in ``_feedback_numba``; run without the GIL. No
contraction to FMA and every sum in order: all machines find the same bytes.
The nearest level is a sum over ``spans``, each (low, high, 1 / step, step) and around the one
before it: what of the value lies in the span and beyond the one inside, rounded to its step. nl4's
two take a quarter of the time of comparing with 15 middles.
"""

from __future__ import annotations

import numba
import numpy as np

LANES = 64
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23, rounds half to even
ZERO, ONE = np.float32(0), np.float32(1)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def turned_columns(w, signs, width, x):
    """x float32 (columns, rows) is w float32 (rows, columns), rotated as
    ``ktk.experts.rotation.rotate`` does; rows a multiple of LANES. width 1: not rotated.
    """
    rows, columns = w.shape
    block = np.empty((max(width, 1), LANES), np.float32)
    shrink = ONE / np.sqrt(np.float32(width))
    for first in range(0, rows, LANES):
        for k0 in range(0, columns, width):
            for n in range(LANES):
                for k in range(width):
                    block[k, n] = w[first + n, k0 + k] * signs[k0 + k]
            step = 1
            while step < width:
                for k in range(width):
                    if not k & step:
                        for n in range(LANES):
                            a, b = block[k, n], block[k + step, n]
                            block[k, n] = a + b
                            block[k + step, n] = a - b
                step *= 2
            for k in range(width):
                for n in range(LANES):
                    x[k0 + k, first + n] = block[k, n] * shrink


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _nearest(value, spans):
    """The nearest level, and how many levels it lies above 0."""
    inside, level, index = ZERO, ZERO, ZERO
    for low, high, per, step in spans:
        wider = low if value < low else value
        wider = high if wider > high else wider
        steps = ((wider - inside) * per + MAGIC) - MAGIC
        level += steps * step
        index += steps
        inside = wider
    return level, index


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _tops(x, k0, k1, lean, top, sign):
    """top (LANES,): the largest size of columns k0..k1; sign: the multiplier's that takes it to
    the side where levels reach further. lean : 1 or -1, that side; 0: there is one sign only.
    """
    for n in range(LANES):
        top[n], sign[n] = ZERO, ZERO
    for k in range(k0, k1):
        for n in range(LANES):
            top[n] = x[k, n] if x[k, n] > top[n] else top[n]
            sign[n] = -x[k, n] if -x[k, n] > sign[n] else sign[n]
    for n in range(LANES):
        is_above = top[n] > sign[n]
        top[n] = top[n] if is_above else sign[n]
        sign[n] = lean if is_above else -lean
        if lean == ZERO:
            sign[n] = ONE


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _loss(x, a, u, weight, k0, k1, step, spans, t, loss):
    """loss (LANES,) of columns k0..k1 rounded to levels times step (LANES,).

    a : targets, x plus what earlier columns hand on; u : what errors hand on, strictly upper, or
    empty; t : written, where u is not empty.
    """
    inverse = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    for n in range(LANES):
        inverse[n] = ZERO if step[n] == ZERO else ONE / step[n]
        loss[n] = ZERO
    if u.shape[0]:
        for k in range(k0, k1):
            for n in range(LANES):
                t[k, n] = a[k, n]
        for k in range(k0, k1):
            for n in range(LANES):
                value = t[k, n] * inverse[n]
                level, _ = _nearest(value, spans)
                rest = value - level
                loss[n] += weight[k] * (rest * rest)
                error[n] = x[k, n] - level * step[n]
            for j in range(k + 1, k1):
                for n in range(LANES):
                    t[j, n] += error[n] * u[k, j]
    else:
        for k in range(k0, k1):
            for n in range(LANES):
                value = a[k, n] * inverse[n]
                level, _ = _nearest(value, spans)
                rest = value - level
                loss[n] += weight[k] * (rest * rest)
    for n in range(LANES):
        loss[n] *= step[n] * step[n]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def channel_scales(x, weight, group, ladder, core, reach, lean, magnitudes, spans, scales):
    """scales (rows,) of least loss, errors not handed on, each group with the magnitude nearest to
    what its largest value wants. x float32 (columns, rows); weight (columns,).

    reach : the largest level. ladder : that times the largest magnitude, in root mean squares of
    the channel. The first ``core`` are tried; those behind while each is better than all before it.
    """
    num_k, num_rows = x.shape
    largest = reach * magnitudes[-1][1]
    num_groups = num_k // group
    xs = np.empty((num_k, LANES), np.float32)
    top = np.empty((num_groups, LANES), np.float32)
    sign = np.empty((num_groups, LANES), np.float32)
    size = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    per = np.empty(LANES, np.float32)
    step = np.empty(LANES, np.float32)
    part = np.empty(LANES, np.float32)
    loss = np.empty(LANES, np.float32)
    least = np.empty(LANES, np.float32)
    is_open = np.empty(LANES, np.bool_)
    nothing = np.empty((0, 0), np.float32)
    for first in range(0, num_rows, LANES):
        size[:] = ZERO
        for k in range(num_k):
            for n in range(LANES):
                xs[k, n] = x[k, first + n]
                size[n] += xs[k, n] * xs[k, n]
        for n in range(LANES):
            size[n] = np.sqrt(size[n] / np.float32(num_k)) / largest
        for g in range(num_groups):
            _tops(xs, g * group, (g + 1) * group, lean, top[g], sign[g])
        least[:] = np.inf
        is_open[:] = True
        for i in range(ladder.shape[0]):
            for n in range(LANES):
                scale[n] = size[n] * ladder[i]
                per[n] = ZERO if scale[n] == ZERO else ONE / (scale[n] * reach)
                loss[n] = ZERO
            for g in range(num_groups):
                for n in range(LANES):
                    magnitude, _ = _nearest(top[g, n] * per[n], magnitudes)
                    step[n] = scale[n] * (magnitude * sign[g, n])
                _loss(xs, xs, nothing, weight, g * group, (g + 1) * group, step, spans, xs, part)
                for n in range(LANES):
                    loss[n] += part[n]
            goes_on = False
            for n in range(LANES):
                is_better = is_open[n] and loss[n] < least[n]
                if is_better:
                    least[n] = loss[n]
                    scales[first + n] = scale[n]
                is_open[n] = is_better or i < core
                goes_on = goes_on or is_open[n]
            if not goes_on:
                break


@numba.njit(nogil=True, cache=True, error_model="numpy")
def round_levels(
    x,
    target,
    u,
    weight,
    start,
    stop,
    group,
    scales,
    table,
    reach,
    lean,
    magnitudes,
    spans,
    origin,
    tries,
    codes,
    chosen,
    error,
):
    """Round columns start..stop to scale * multiplier * level, the multiplier of least loss of
    ``tries`` for each group: (away, turn) is the magnitude ``away`` from what the group's largest
    value wants, with the sign that value wants, times turn.

    x, target float32 (columns, rows); table : the magnitudes, ascending. scales (rows,). origin :
    the indices that 0 has, or would have, among the magnitudes and among the levels. Written:
    codes uint8 (columns, rows); chosen uint8 (groups, rows), indices of all magnitudes, then of
    their negatives; where errors are handed on, u is not empty, error (stop - start, rows).
    """
    num_k, num_rows = stop - start, x.shape[1]
    hands_on = u.shape[0] > 0
    xs = np.empty((num_k, LANES), np.float32)
    targets = np.empty((num_k, LANES), np.float32) if hands_on else xs
    t = np.empty((num_k, LANES), np.float32) if hands_on else xs
    scale = np.empty(LANES, np.float32)
    top = np.empty(LANES, np.float32)
    sign = np.empty(LANES, np.float32)
    at = np.empty(LANES, np.int32)
    step = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    rest = np.empty(LANES, np.float32)
    loss = np.empty(LANES, np.float32)
    least = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.int32)
    count = table.shape[0]
    for first in range(0, num_rows, LANES):
        for k in range(num_k):
            for n in range(LANES):
                xs[k, n] = x[start + k, first + n]
        if hands_on:
            for k in range(num_k):
                for n in range(LANES):
                    targets[k, n] = target[start + k, first + n]
        for n in range(LANES):
            scale[n] = scales[first + n]
        for g in range(num_k // group):
            k0, k1 = g * group, (g + 1) * group
            _tops(targets, k0, k1, lean, top, sign)
            for n in range(LANES):
                per = ZERO if scale[n] == ZERO else ONE / (scale[n] * reach)
                _, index = _nearest(top[n] * per, magnitudes)
                at[n] = np.int32(index) + origin[0]
            least[:] = np.inf
            best[:] = 0
            for i in range(tries.shape[0]):
                for n in range(LANES):
                    place = min(max(at[n] + tries[i, 0], 0), count - 1)
                    step[n] = scale[n] * (table[place] * sign[n] * np.float32(tries[i, 1]))
                _loss(xs, targets, u, weight[start:stop], k0, k1, step, spans, t, loss)
                for n in range(LANES):
                    is_better = loss[n] < least[n]
                    least[n] = loss[n] if is_better else least[n]
                    best[n] = i if is_better else best[n]
            for n in range(LANES):
                place = min(max(at[n] + tries[best[n], 0], 0), count - 1)
                multiplier = table[place] * sign[n] * np.float32(tries[best[n], 1])
                chosen[start // group + g, first + n] = place + (count if multiplier < ZERO else 0)
                step[n] = scale[n] * multiplier
                inverse[n] = ZERO if step[n] == ZERO else ONE / step[n]
            for k in range(k0, k1):
                for n in range(LANES):
                    level, index = _nearest(targets[k, n] * inverse[n], spans)
                    codes[start + k, first + n] = np.uint8(np.int32(index) + origin[1])
                    rest[n] = xs[k, n] - level * step[n]
                if hands_on:
                    for n in range(LANES):
                        error[k, first + n] = rest[n]
                    for j in range(k + 1, num_k):
                        for n in range(LANES):
                            targets[j, n] += rest[n] * u[k, j]
