/* What is the same for every ISA: the table of formats, sizes, the table of kernels. */
#include "llamafile.h"

#include <stddef.h>

#include "formats.h"

#define LF_DEFINE_GRIDS
#include "grids.h"

#define INTEGER_ROW(NAME, TEXT, TYPE, WEIGHTS, BYTES, RUN, DWORDS, HEAD, HEAD_BYTES, FINE, ...)              \
    {TEXT, TYPE, WEIGHTS, BYTES, FINE, 0},
#define FLOAT_ROW(NAME, TEXT, TYPE, BYTES, PER_DWORD) {TEXT, TYPE, 1, BYTES, 0, 1},
const lf_format lf_formats[] = {LF_FLOAT_FORMATS(FLOAT_ROW) LF_INTEGER_FORMATS(INTEGER_ROW)};
const int32_t lf_num_formats = sizeof lf_formats / sizeof *lf_formats;

/* LF_ROWS is ROW(avx2) ROW(avx512) ...: the ISAs that kernels.c was compiled for, slowest first. */
#define ROW(isa) extern const lf_kernels lf_kernels_##isa;
LF_ROWS
#undef ROW
#define ROW(isa) &lf_kernels_##isa,
static const lf_kernels *const KERNELS[] = {LF_ROWS NULL};

const lf_kernels *lf_kernels_row(int index) { return KERNELS[index]; }

int64_t lf_panel_bytes(const lf_matrix *w) {
    const lf_format *f = &lf_formats[w->format];
    return (int64_t)LF_PANEL * (w->in_features / f->block_weights) * f->block_bytes;
}

int64_t lf_work_bytes(const lf_matrix *w, int num_rows) {
    const int64_t K = w->in_features;
    /* A chunk as it is laid down, all of a row for `unpack`: four bytes a k at most. */
    const int64_t panel = 4 * LF_PANEL * (K > 4096 ? K : 4096);
    /* Codes of four bytes at most, a scale for 32, a correction for 16; and what lies between tiles. */
    const int64_t row = 4 * K + 4 * (K / 32 + 1) + 4 * K / 16 + 64;
    return panel + (num_rows ? num_rows * row + 4096 : 0);
}

int lf_codes_of(const lf_kernels *kernels, int format) {
    enum { BF16 = 30 };
    if (!lf_formats[format].is_float) return LF_CODES_I8;
    return lf_formats[format].ggml_type == BF16 ? kernels->bf16_codes : LF_CODES_F32;
}
