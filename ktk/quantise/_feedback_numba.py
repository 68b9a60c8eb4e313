"""Kernels of ``ktk.quantise.feedback``: round a block of columns, each column's error handed on to
those behind it.

LANES rows (output channels) in lockstep, so that LLVM turns each loop over lanes into vector code:
64 of them, since with 16 the compiler's checks for overlapping arrays cost more than the work (4 ->
14 M weights/s of int4 group 32 on one Zen 4 core).
Run without the GIL. Arrays named x, a, t, e, codes hold (columns, LANES).
"""

from __future__ import annotations

import numba
import numpy as np

LANES = 64
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23, rounds half to even; codes stay far below 2**22
ZERO, ONE = np.float32(0), np.float32(1)
CONTRACT = {"contract"}  # FMA: the sums have no order that anyone promises
ROUND_NOT, ROUND_BF16, ROUND_FP16, ROUND_POWER_OF_TWO = range(4)


@numba.njit(nogil=True, cache=True, fastmath=CONTRACT)
def code_columns(x, a, u, weight, k0, k1, scale, low, code_min, code_max, table, t, e, codes, loss):
    """Code columns k0..k1 with ``scale`` and ``low``, (LANES,): value = scale * level - low.

    a : targets, the weights x plus what columns before k0 hand on; e, codes and loss (LANES,) are
        written.
    table : the levels, ascending, where they are no integers code_min..code_max.
    """
    inverse = np.empty(LANES, np.float32)
    level = np.empty(LANES, np.float32)
    for n in range(LANES):
        inverse[n] = ZERO if scale[n] == ZERO else ONE / scale[n]
        loss[n] = ZERO
    for k in range(k0, k1):
        for n in range(LANES):
            t[k, n] = a[k, n]
    for k in range(k0, k1):
        if table.shape[0]:
            for n in range(LANES):
                codes[k, n] = ZERO
                level[n] = table[0]
            for i in range(table.shape[0] - 1):
                step = table[i + 1] - table[i]
                middle = np.float32(0.5) * (table[i + 1] + table[i])
                for n in range(LANES):
                    above = ONE if t[k, n] * inverse[n] > middle else ZERO
                    codes[k, n] += above
                    level[n] += above * step
        else:
            for n in range(LANES):
                q = ((t[k, n] + low[n]) * inverse[n] + MAGIC) - MAGIC
                q = code_min if q < code_min else q
                q = code_max if q > code_max else q
                codes[k, n] = q
                level[n] = q
        importance = weight[k]
        for n in range(LANES):
            value = level[n] * scale[n] - low[n]
            rest = t[k, n] - value
            loss[n] += importance * (rest * rest)
            e[k, n] = x[k, n] - value
        for j in range(k + 1, k1):
            f = u[k, j]
            for n in range(LANES):
                t[j, n] += e[k, n] * f


@numba.njit(nogil=True, cache=True)
def _round_scale(scale, rounding):
    """Each of scale (LANES,) to a number that the format stores."""
    bits = scale.view(np.uint32)
    if rounding == ROUND_BF16:
        for n in range(LANES):
            b = bits[n]
            bits[n] = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(
                0xFFFF0000
            )
    elif rounding == ROUND_FP16:
        for n in range(LANES):
            # adding 0.75 leaves half precision's smallest step, 2**-24, in the last place
            small = (abs(scale[n]) + np.float32(0.75)) - np.float32(0.75)
            if abs(scale[n]) < np.float32(2.0**-14):
                scale[n] = -small if scale[n] < ZERO else small
            else:
                b = bits[n]
                bits[n] = (b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) & (
                    np.uint32(0xFFFFE000)
                )
    elif rounding == ROUND_POWER_OF_TWO:
        for n in range(LANES):
            bits[n] &= np.uint32(0x7F800000)


@numba.njit(nogil=True, cache=True, fastmath=CONTRACT)
def _refit(x, a, u, weight, k0, k1, codes, table, is_affine, fit, coded, scale, low):
    """The scale, and low if is_affine, of least loss for the codes found;
    the feedback within the group counted.
    """
    cross = np.zeros((3, LANES), np.float32)
    square = np.zeros(LANES, np.float32)
    ones = ZERO
    for k in range(k0, k1):
        c = ONE
        for n in range(LANES):
            fit[k, n] = a[k, n]
            coded[k, n] = table[np.int64(codes[k, n])] if table.shape[0] else codes[k, n]
        for j in range(k0, k):
            f = u[j, k]
            c += f
            for n in range(LANES):
                fit[k, n] += x[j, n] * f
        level_of_k = coded[k]
        for j in range(k0, k):
            f = u[j, k]
            for n in range(LANES):
                level = table[np.int64(codes[j, n])] if table.shape[0] else codes[j, n]
                level_of_k[n] += level * f
        d = weight[k]
        ones += d * c * c
        for n in range(LANES):
            square[n] += d * coded[k, n] * coded[k, n]
            cross[0, n] += d * fit[k, n] * coded[k, n]
            cross[1, n] += d * fit[k, n] * c
            cross[2, n] += d * coded[k, n] * c
    for n in range(LANES):
        best = cross[0, n] / square[n] if square[n] > ZERO else ZERO
        low[n] = ZERO
        if is_affine:
            determinant = square[n] * ones - cross[2, n] * cross[2, n]
            if determinant > ZERO:
                m = (cross[0, n] * cross[2, n] - cross[1, n] * square[n]) / determinant
                if m > ZERO:  # none below zero can be stored
                    low[n] = m
                    best = (cross[0, n] * ones - cross[1, n] * cross[2, n]) / determinant
            best = ZERO if best < ZERO else best
        scale[n] = best


@numba.njit(nogil=True, cache=True)
def _keep_better(k0, k1, is_first, loss, e, codes, scale, low, best, best_e, best_codes, chosen):
    """Where the loss is less, take these codes over; chosen (2, LANES): scale and low."""
    for n in range(LANES):
        if loss[n] < best[n] or is_first:
            best[n] = loss[n]
            chosen[0, n] = scale[n]
            chosen[1, n] = low[n]
            for k in range(k0, k1):
                best_e[k, n] = e[k, n]
                best_codes[k, n] = codes[k, n]


@numba.njit(nogil=True, cache=True)
def _search(
    x,
    a,
    u,
    weight,
    k0,
    k1,
    ladder,
    refits,
    code_min,
    code_max,
    table,
    is_affine,
    rounding,
    work,
    loss,
    best,
    chosen,
):
    """The scale (and low) of least loss of columns k0..k1;
    work[3] and work[4] hold its errors and codes.
    """
    t, e, codes, best_e, best_codes, coded = work[0], work[1], work[2], work[3], work[4], work[5]
    scale = np.empty(LANES, np.float32)
    low = np.zeros(LANES, np.float32)
    bottom = np.zeros(LANES, np.float32)
    span = np.zeros(LANES, np.float32)
    for k in range(k0, k1):
        for n in range(LANES):
            v = a[k, n]
            if is_affine:
                bottom[n] = min(bottom[n], v)
                span[n] = max(span[n], v)
            else:
                span[n] = max(span[n], abs(v))
    for n in range(LANES):
        span[n] -= bottom[n]
    for step in range(ladder.shape[0] + refits):
        if step < ladder.shape[0]:
            for n in range(LANES):
                scale[n] = span[n] / ladder[step]
                low[n] = -bottom[n]
        else:
            _refit(x, a, u, weight, k0, k1, best_codes, table, is_affine, t, coded, scale, low)
        _round_scale(scale, rounding)
        code_columns(
            x, a, u, weight, k0, k1, scale, low, code_min, code_max, table, t, e, codes, loss
        )
        _keep_better(
            k0, k1, step == 0, loss, e, codes, scale, low, best, best_e, best_codes, chosen
        )


@numba.njit(nogil=True, cache=True)
def _nearest_int(value, step, low, high):
    q = ZERO if step == ZERO else (value / step + MAGIC) - MAGIC
    q = low if q < low else q
    return high if q > high else q


@numba.njit(nogil=True, cache=True)
def _half_up(value):
    """The next half-precision number not below each of value (LANES,), 0 or more."""
    bits = value.view(np.uint32)
    for n in range(LANES):
        if value[n] < np.float32(2.0**-14):
            value[n] = np.ceil(value[n] * np.float32(2.0**24)) * np.float32(2.0**-24)
        else:
            bits[n] = (bits[n] + np.uint32(0x1FFF)) & np.uint32(0xFFFFE000)


@numba.njit(nogil=True, cache=True)
def round_block(
    x_all,
    a_all,
    u,
    weight,
    group,
    ladder,
    refits,
    code_min,
    code_max,
    table,
    is_affine,
    rounding,
    int_min,
    int_max,
    neighbours,
    codes_out,
    scales_out,
    lows_out,
    ints_out,
    supers_out,
    error_out,
    loss_out,
):
    """Round a block of columns of all rows; int_max 0: each group's scale is stored itself, else as
    an integer of supers.

    x_all float32 (columns, rows), the weights; a_all the same plus what earlier columns hand on;
    rows a multiple of LANES.
    u float32 (columns, columns), strictly upper; weight (columns,). Written: codes_out int16 and
    error_out float32 (columns, rows); scales_out, lows_out float32 and ints_out int16 (2, groups,
    rows): integer scales and lows; supers_out float32 (2, rows): what those multiply. loss_out
    (rows,) is added to.
    """
    columns, rows = x_all.shape
    num_groups = columns // group
    x = np.empty((columns, LANES), np.float32)
    a = np.empty((columns, LANES), np.float32)
    work = np.empty((6, columns, LANES), np.float32)
    t, e, codes, best_e, best_codes = work[0], work[1], work[2], work[3], work[4]
    loss = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    chosen = np.empty((2, LANES), np.float32)
    scale = np.empty(LANES, np.float32)
    low = np.empty(LANES, np.float32)
    d = np.zeros(LANES, np.float32)
    dmin = np.zeros(LANES, np.float32)
    ideal = np.empty((2, LANES), np.float32)
    for first in range(0, rows, LANES):
        for k in range(columns):
            for n in range(LANES):
                x[k, n] = x_all[k, first + n]
                a[k, n] = a_all[k, first + n]
        if int_max != ZERO:
            d[:] = ZERO
            dmin[:] = ZERO
            for g in range(num_groups):
                _search(
                    x,
                    a,
                    u,
                    weight,
                    g * group,
                    g * group + group,
                    ladder,
                    refits,
                    code_min,
                    code_max,
                    table,
                    is_affine,
                    rounding,
                    work,
                    loss,
                    best,
                    chosen,
                )
                for n in range(LANES):
                    d[n] = max(d[n], abs(chosen[0, n]))
                    dmin[n] = max(dmin[n], chosen[1, n])
            for n in range(LANES):
                d[n] /= int_max
                dmin[n] /= int_max
            _half_up(d)
            _half_up(dmin)
            for n in range(LANES):
                supers_out[0, first + n] = d[n]
                supers_out[1, first + n] = dmin[n]
        for g in range(num_groups):
            k0, k1 = g * group, g * group + group
            _search(
                x,
                a,
                u,
                weight,
                k0,
                k1,
                ladder,
                refits,
                code_min,
                code_max,
                table,
                is_affine,
                rounding,
                work,
                loss,
                best,
                chosen,
            )
            if int_max != ZERO:
                is_first = True
                for again in range(2):
                    if again:  # around what fits the codes found
                        _refit(
                            x,
                            a,
                            u,
                            weight,
                            k0,
                            k1,
                            best_codes,
                            table,
                            is_affine,
                            t,
                            work[5],
                            scale,
                            low,
                        )
                        for n in range(LANES):
                            ideal[0, n] = scale[n]
                            ideal[1, n] = low[n]
                    else:
                        ideal[:] = chosen
                    for i in range(neighbours.shape[0]):
                        for j in range(neighbours.shape[0] if is_affine else 1):
                            for n in range(LANES):
                                q = _nearest_int(ideal[0, n], d[n], int_min, int_max)
                                q = min(max(q + neighbours[i], int_min), int_max)
                                scale[n] = d[n] * q
                                low[n] = ZERO
                                if is_affine:
                                    q = _nearest_int(ideal[1, n], dmin[n], ZERO, int_max)
                                    q = min(max(q + neighbours[j], ZERO), int_max)
                                    low[n] = dmin[n] * q
                            code_columns(
                                x,
                                a,
                                u,
                                weight,
                                k0,
                                k1,
                                scale,
                                low,
                                code_min,
                                code_max,
                                table,
                                t,
                                e,
                                codes,
                                loss,
                            )
                            _keep_better(
                                k0,
                                k1,
                                is_first,
                                loss,
                                e,
                                codes,
                                scale,
                                low,
                                best,
                                best_e,
                                best_codes,
                                chosen,
                            )
                            is_first = False
                for n in range(LANES):
                    ints_out[0, g, first + n] = np.int16(
                        _nearest_int(chosen[0, n], d[n], int_min, int_max)
                    )
                    ints_out[1, g, first + n] = np.int16(
                        _nearest_int(chosen[1, n], dmin[n], ZERO, int_max)
                    )
            for n in range(LANES):
                scales_out[g, first + n] = chosen[0, n]
                lows_out[g, first + n] = chosen[1, n]
                loss_out[first + n] += best[n]
            _hand_on(a, u, best_e, k0, k1, columns)
            for k in range(k0, k1):
                for n in range(LANES):
                    codes_out[k, first + n] = np.int16(best_codes[k, n])
                    error_out[k, first + n] = best_e[k, n]


@numba.njit(nogil=True, cache=True, fastmath=CONTRACT)
def _hand_on(a, u, error, k0, k1, columns):
    for j in range(k1, columns):
        for k in range(k0, k1):
            f = u[k, j]
            for n in range(LANES):
                a[j, n] += error[k, n] * f


@numba.njit(nogil=True, cache=True)
def round_with_scales(
    x_all, a_all, u, weight, scales, code_min, code_max, codes_out, error_out, loss_out
):
    """The same with the scales given, float32 (rows,): for one scale per row,
    longer than a block.
    """
    columns, rows = x_all.shape
    x = np.empty((columns, LANES), np.float32)
    a = np.empty((columns, LANES), np.float32)
    t = np.empty((columns, LANES), np.float32)
    e = np.empty((columns, LANES), np.float32)
    codes = np.empty((columns, LANES), np.float32)
    loss = np.empty(LANES, np.float32)
    low = np.zeros(LANES, np.float32)
    table = np.empty(0, np.float32)
    for first in range(0, rows, LANES):
        for k in range(columns):
            for n in range(LANES):
                x[k, n] = x_all[k, first + n]
                a[k, n] = a_all[k, first + n]
        code_columns(
            x,
            a,
            u,
            weight,
            0,
            columns,
            scales[first : first + LANES],
            low,
            code_min,
            code_max,
            table,
            t,
            e,
            codes,
            loss,
        )
        for k in range(columns):
            for n in range(LANES):
                codes_out[k, first + n] = np.int16(codes[k, n])
                error_out[k, first + n] = e[k, n]
        for n in range(LANES):
            loss_out[first + n] += loss[n]
