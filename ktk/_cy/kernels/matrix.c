/* What the operator needs to know of a matrix, for packed panels and for GGUF blocks: which kernel, which activations. */
#include <stddef.h>

#include "ktk.h"
#include "llamafile.h"

static int smaller(int a, int b) { return a < b ? a : b; }

void ktk_use_packed(ktk_matrix *m, const ktk_kernels *kernels) {
    m->gemm = kernels->gemm[m->format];
    m->blocks = NULL;
    m->is_repacked = 0;
    m->codes_kind = kernels->codes_kind[m->format];
    m->fine_group = smaller(m->group_size, m->activation_group);
    m->zero_point = m->format == KTK_INT8 ? 128 : 8;
    m->max_rows = KTK_MAX_ROWS;
    m->work_bytes = KTK_WORK_BYTES(2 * (int64_t)m->padded_in);
}

static lf_matrix blocks_of(const ktk_matrix *m) {
    return (lf_matrix){m->format, m->is_repacked, m->padded_in, m->activation_group};
}

static void gemm_blocks(const ktk_matrix *m, const uint8_t *panels, int num_panels, const ktk_rows *a,
                        const int32_t *rows, int num_rows, float *out, int64_t out_stride,
                        const uint8_t *next, uint8_t *work) {
    const lf_matrix w = blocks_of(m);
    const lf_rows x = {.codes = a->codes,
                       .scales = a->scales,
                       .sums = a->correction,
                       .code_stride = a->code_stride,
                       .scale_stride = a->scale_stride,
                       .sum_stride = a->correction_stride,
                       .are_packed = a->are_packed};
    ((const lf_kernels *)m->blocks)
        ->gemm(&w, panels, num_panels, &x, rows, num_rows, out, out_stride, next, work);
}

/* Rows of a task: an expert's panels are unpacked once for them all, but activations must stay in the L2 cache. */
enum { ROWS_BYTES = 256 << 10, FEWEST_ROWS = 32 };

void ktk_use_blocks(ktk_matrix *m, int format, int isa, int in_features, int num_panels, int activation_group,
                    int is_repacked) {
    static const int kind_of[] = {
        [LF_CODES_I8] = KTK_CODES_I8, [LF_CODES_F32] = KTK_CODES_F32, [LF_CODES_BF16] = KTK_CODES_BF16};
    const lf_kernels *kernels = lf_kernels_row(isa);
    *m = (ktk_matrix){.format = format,
                      .padded_in = in_features,
                      .num_panels = num_panels,
                      .activation_group = activation_group,
                      .gemm = gemm_blocks,
                      .blocks = kernels,
                      .is_repacked = is_repacked,
                      .codes_kind = kind_of[lf_codes_of(kernels, format)],
                      .fine_group = 16,
                      .zero_point = -1}; /* the correction is the sum itself */
    const lf_matrix w = blocks_of(m);
    const int rows = ROWS_BYTES / in_features;
    m->max_rows = rows > LF_MAX_ROWS ? LF_MAX_ROWS : rows < FEWEST_ROWS ? FEWEST_ROWS : rows;
    m->panel_bytes = lf_panel_bytes(&w);
    m->work_bytes = lf_work_bytes(&w, m->max_rows);
}
