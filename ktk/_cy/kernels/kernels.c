/* The table of kernels: a row a level, filled from the lowest up. A level has what its own sources
 * give it, and of the level below it the rest. */
#include <pthread.h>
#include <stddef.h>
#include <string.h>

#include "ktk.h"

/* From gemm.c, gemm_coded.c, products_f32.c, products_i16.c, gemm_amx.c, gemm_amx_bf16.c and
 * vendor/llamafile/kernels.c, each compiled for the level it is named for. */
extern const ktk_kernels ktk_panels_avx2, ktk_panels_avx512, ktk_panels_avx512vnni, ktk_tiles_amx,
    ktk_tiles_amxbf16;
extern const ktk_kernels ktk_coded_avx2, ktk_coded_avx512;
extern const ktk_kernels ktk_products_i16_avx2, ktk_products_i16_avx512,
    ktk_products_i16_avx512vnni;
extern const ktk_kernels ktk_products_f32_avx2, ktk_products_f32_avx512,
    ktk_products_f32_avx512vnni;
extern const ktk_kernels lf_blocks_avx2, lf_blocks_avx512, lf_blocks_avx512vnni,
    lf_blocks_avx512bf16;

/* Slowest level first, as ktk/_cy/isa.py and ktk.machine.cpu.ISA_LEVELS have them. */
static const ktk_kernels *const SOURCES[] = {
    &ktk_panels_avx2,
    &ktk_coded_avx2,
    &ktk_products_f32_avx2,
    &ktk_products_i16_avx2,
    &lf_blocks_avx2,
    &ktk_panels_avx512,
    &ktk_coded_avx512,
    &ktk_products_f32_avx512,
    &ktk_products_i16_avx512,
    &lf_blocks_avx512,
    &ktk_panels_avx512vnni,
    &ktk_products_f32_avx512vnni,
    &ktk_products_i16_avx512vnni,
    &lf_blocks_avx512vnni,
    &lf_blocks_avx512bf16, /* */
    &ktk_tiles_amx,
    &ktk_tiles_amxbf16,
};
enum { NUM_SOURCES = sizeof SOURCES / sizeof *SOURCES };

static ktk_kernels levels[NUM_SOURCES];
static int num_levels;

#define COUNT(NAME) +1
_Static_assert(sizeof(ktk_kernels) == offsetof(ktk_kernels, quantise) +
                                          (0 KTK_FUNCTIONS(COUNT)) * sizeof(void (*)(void)),
               "KTK_FUNCTIONS names every function");

static void take(ktk_kernels *level, const ktk_kernels *from) {
    level->name = from->name;
    if (from->tasks.up_panels) level->tasks = from->tasks;
    for (int f = 0; f < KTK_NUM_FORMATS; f++)
        if (from->gemm[f].run) level->gemm[f] = from->gemm[f];
    for (int f = 0; f < KTK_NUM_FORMATS; f++)
        if (from->decode[f]) level->decode[f] = from->decode[f];
    for (int f = 0; f < KTK_NUM_FORMATS; f++)
        if (from->codes[f]) level->codes[f] = from->codes[f];
#define TAKE(NAME)                                                                                 \
    if (from->NAME) level->NAME = from->NAME;
    KTK_FUNCTIONS(TAKE)
#undef TAKE
}

static void fill(void) {
    for (int i = 0; i < NUM_SOURCES; i++) {
        const int is_new = !i || strcmp(SOURCES[i]->name, SOURCES[i - 1]->name);
        if (is_new && num_levels++) levels[num_levels - 1] = levels[num_levels - 2];
        take(&levels[num_levels - 1], SOURCES[i]);
    }
}

const ktk_kernels *ktk_kernels_row(int index) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill);
    return index < num_levels ? &levels[index] : NULL;
}

void ktk_use_kernels(ktk_matrix *m, const ktk_kernels *kernels) {
    const ktk_gemm *gemm = &kernels->gemm[m->format];
    const ktk_format_row *format = &ktk_formats[m->format];
    const int smaller = m->group_size < m->activation_group ? m->group_size : m->activation_group;
    const int rows = gemm->rows_bytes / m->padded_in;
    m->gemm = gemm->run;
    m->codes_kind = gemm->codes_kind;
    m->fine_group = format->sums_of ? format->sums_of : smaller;
    m->zero_point = format->zero_point;
    m->max_rows = rows > gemm->most_rows     ? gemm->most_rows
                  : rows < gemm->fewest_rows ? gemm->fewest_rows
                                             : rows;
    m->work_bytes =
        gemm->work.fixed +
        m->max_rows * (gemm->work.row + m->padded_in / 32 * (int64_t)gemm->work.row_32k);
}
