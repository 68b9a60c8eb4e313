/* Activations as the kernels take them: where rows lie in scratch memory, and how one is put there.
 */
#ifndef KTK_OPERAND_H
#define KTK_OPERAND_H

#include <string.h>

#include "ktk.h"

static inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int is_float(const ktk_matrix *w) {
    return w->codes_kind == KTK_CODES_F32 || w->codes_kind == KTK_CODES_BF16 ||
           w->codes_kind == KTK_CODES_F32_HIGH;
}
/* Of n codes, which for planes are whole groups. */
static inline int64_t code_bytes(int codes_kind, int n) {
    static const int bytes_of[] = {1, 2, 4, 2, 4, sizeof(ktk_planes) / KTK_PLANES_K};
    return (int64_t)n * bytes_of[codes_kind];
}
static inline int64_t dtype_bytes(int dtype) {
    return dtype == KTK_DTYPE_F32 ? 4 : dtype == KTK_DTYPE_I8 ? 1 : 2;
}

/* Bump allocation; with base NULL it only counts. */
typedef struct {
    uint8_t *base;
    int64_t used;
} arena;

static inline void *take(arena *a, int64_t bytes) {
    void *at = a->base ? a->base + a->used : NULL;
    a->used += round_up(bytes, 64);
    return at;
}

/* Rows lie an odd number of cache lines apart: equal distances of whole pages would share few cache
 * sets. */
static inline ktk_rows take_rows(arena *a, const ktk_matrix *w, int64_t num_rows) {
    ktk_rows r = {0};
    r.code_stride = round_up(code_bytes(w->codes_kind, w->padded_in), 128) + 64;
    r.codes = take(a, r.code_stride * num_rows);
    if (is_float(w)) return r;
    /* Whole steps of gemm.c's interleave: it would read into the next row, which another thread may
     * be writing. */
    r.scale_stride = round_up((w->padded_in + w->activation_group - 1) / w->activation_group, 4);
    r.correction_stride = round_up((w->padded_in + w->fine_group - 1) / w->fine_group, 4);
    r.scales = take(a, 4 * r.scale_stride * num_rows);
    r.correction = take(a, 4 * r.correction_stride * num_rows);
    return r;
}

/* Columns [column, column + n) of one row. column is a multiple of both groups. */
static inline void put_row(const ktk_kernels *kernels, const ktk_matrix *w, const ktk_rows *rows,
                           int64_t row, int column, const float *values, int n) {
    uint8_t *codes = rows->codes + row * rows->code_stride + code_bytes(w->codes_kind, column);
    if (w->codes_kind == KTK_CODES_F32) {
        memcpy(codes, values, 4 * (size_t)n);
        return;
    }
    if (w->codes_kind == KTK_CODES_F32_HIGH) {
        float *to = (float *)codes;
        for (int i = 0; i < n; i++) to[i] = values[i] * KTK_ROWS_HIGH;
        return;
    }
    if (w->codes_kind == KTK_CODES_BF16) {
        kernels->store(KTK_DTYPE_BF16, values, n, codes);
        return;
    }
    kernels->quantise(values, n, w->activation_group, w->fine_group, w->zero_point, w->codes_kind,
                      codes, rows->scales + row * rows->scale_stride + column / w->activation_group,
                      rows->correction + row * rows->correction_stride + column / w->fine_group);
}

static inline int is_finite_row(const float *x, int n) {
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000u;
}

/* Columns [column, column + n) turned in place where the matrix's are. */
static inline void turn_row(const ktk_kernels *kernels, const ktk_matrix *w, int column,
                            float *values, int n) {
    if (w->rotation) kernels->rotate(values, column, n, w->rotation, w->rotation_seed);
}

/* A whole row, which is turned in place. Integer formats make a group with inf or NaN NaN; float
 * ones must make the row NaN: a clamp would make inf finite. */
static inline void put_token(const ktk_kernels *kernels, const ktk_matrix *w, const ktk_rows *rows,
                             int64_t token, float *x) {
    if (is_float(w) && !is_finite_row(x, w->padded_in))
        for (int i = 0; i < w->padded_in; i++) x[i] = __builtin_nanf("");
    turn_row(kernels, w, 0, x, w->padded_in);
    put_row(kernels, w, rows, token, 0, x, w->padded_in);
}

#endif
