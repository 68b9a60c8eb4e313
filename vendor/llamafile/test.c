/* Every format on every ISA of this CPU: known blocks, products against sums in double, and equal
 * bits whatever the batch, the ISA and the order of the weights. What is read or written ends at a
 * page that may not be touched. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ktk_kernels.h"
#include "test_vectors.h"
/* after the type that it uses */
#include "ik_vectors.h"

enum {
    NUM_PANELS = 4,
    NUM_CHANNELS = NUM_PANELS * KTK_PANEL,
    MAX_K = 768,
    NUM_ROWS = 40,
    OUT_STRIDE = 80
};
static const int ROW_COUNTS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, NUM_ROWS};
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static int failures;
#define CHECK(claim, ...)                                                                          \
    do {                                                                                           \
        if (!(claim)) {                                                                            \
            failures++;                                                                            \
            printf("FAILED %s: ", #claim);                                                         \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

static uint64_t random_state = 1;
static uint32_t random_bits(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}
static float random_float(void) { return (float)(int32_t)random_bits() * 0x1p-31f; }

/* Memory whose last byte is followed by a page that may not be touched. */
typedef struct {
    uint8_t *pages;
    size_t size;
} guarded;

static guarded guard(size_t size) {
    const size_t page = 4096;
    guarded g = {NULL, (size + page - 1) / page * page};
    g.pages = mmap(NULL, g.size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.pages == MAP_FAILED || mprotect(g.pages + g.size, page, PROT_NONE)) abort();
    return g;
}
static void *last(const guarded *g, size_t size) { return g->pages + g->size - size; }

static int is_here(const char *isa) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!strcmp(isa, "avx2")) return 1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 0;
    if (!strcmp(isa, "avx512")) return 1;
    if (!__builtin_cpu_supports("avx512vnni")) return 0;
    if (!strcmp(isa, "avx512vnni")) return 1;
    return !strcmp(isa, "avx512bf16") && __builtin_cpu_supports("avx512bf16");
}

extern const ktk_kernels lf_blocks_avx2, lf_blocks_avx512, lf_blocks_avx512vnni,
    lf_blocks_avx512bf16;

/* The levels, slowest first; NULL past the last. */
static const ktk_kernels *kernels_row(int index) {
    static const ktk_kernels *const ROWS[] = {&lf_blocks_avx2, &lf_blocks_avx512,
                                              &lf_blocks_avx512vnni};
    static ktk_kernels with_bf16;
    if (index < COUNT(ROWS)) return ROWS[index];
    with_bf16 = lf_blocks_avx512vnni;
    with_bf16.name = lf_blocks_avx512bf16.name;
    with_bf16.gemm[KTK_BLOCK_bf16] = lf_blocks_avx512bf16.gemm[KTK_BLOCK_bf16];
    return index == COUNT(ROWS) ? &with_bf16 : NULL;
}

static const vector *vector_of(const ktk_format_row *f) {
    for (int i = 0; i < COUNT(VECTORS); i++)
        if (!strcmp(VECTORS[i].name, f->name)) return &VECTORS[i];
    for (int i = 0; i < COUNT(IK_VECTORS); i++)
        if (!strcmp(IK_VECTORS[i].name, f->name)) return &IK_VECTORS[i];
    return NULL;
}

/* -- weights and activations
 * ----------------------------------------------------------------------------------- */

static guarded panel_pages, repacked_pages, row_pages, scale_pages, sum_pages, work_pages,
    out_pages;

static int64_t row_bytes(const ktk_matrix *w) { return w->panel_bytes / KTK_PANEL; }

static ktk_matrix matrix_of(int format, int in_features, int activation_group) {
    const ktk_format_row *f = &ktk_formats[format];
    return (ktk_matrix){.format = format,
                        .padded_in = in_features,
                        .activation_group = activation_group,
                        .panel_bytes =
                            (int64_t)KTK_PANEL *
                            (f->row_head + in_features / f->block_weights * f->block_bytes)};
}

/* Blocks of random bits, in a panel's first two rows of ones and of zeros; scales from the known
 * ones. */
static void random_panels(const ktk_matrix *w, const vector *v, uint8_t *panels, int num_panels) {
    const ktk_format_row *f = &ktk_formats[w->format];
    const int num_blocks = w->padded_in / f->block_weights,
              known = v->num_weights / f->block_weights;
    for (int i = 0; i < num_panels * KTK_PANEL * num_blocks; i++, panels += f->block_bytes) {
        if (f->row_head && i % num_blocks == 0) {
            memcpy(panels, v->blocks, (size_t)f->row_head);
            panels[0] = (uint8_t)random_bits(); /* no two rows have one scale */
            panels += f->row_head;
        }
        const uint8_t *from =
            v->blocks + random_bits() % (uint32_t)known * (uint32_t)f->block_bytes;
        const int row = i / num_blocks % KTK_PANEL;
        for (int j = 0; j < f->block_bytes; j++)
            panels[j] = (uint8_t)(row == 0 ? 0xff : row == 1 ? 0 : random_bits());
        for (int j = 0; v->scale_bits[j].mask && !f->row_head; j++) {
            const int at = v->scale_bits[j].at, mask = v->scale_bits[j].mask;
            panels[at] = (uint8_t)((panels[at] & ~mask) | (from[at] & mask));
        }
    }
}

/* Activations as a kernel wants them, and their values. */
typedef struct {
    ktk_rows rows;
    double value[NUM_ROWS][MAX_K];
} activations;

static void random_rows(const ktk_matrix *w, int codes, activations *a) {
    const int K = w->padded_in, groups = (K + w->activation_group - 1) / w->activation_group;
    const int64_t stride = (int64_t)K * (codes == KTK_CODES_I8    ? 1
                                         : codes == KTK_CODES_F32 ? 4
                                                                  : 2);
    uint8_t *row = last(&row_pages, (size_t)(NUM_ROWS * stride));
    float *scales = last(&scale_pages, 4 * (size_t)(NUM_ROWS * groups));
    int32_t *sums = last(&sum_pages, 4 * (size_t)(NUM_ROWS * K / 16));
    a->rows = (ktk_rows){.codes = row,
                         .scales = scales,
                         .correction = sums,
                         .code_stride = stride,
                         .scale_stride = groups,
                         .correction_stride = K / 16};
    for (int m = 0; m < NUM_ROWS; m++, row += stride) {
        for (int g = 0; g < groups; g++)
            scales[m * groups + g] = 0.01f + 0.01f * fabsf(random_float());
        for (int k = 0; k < K; k++) {
            const float value = random_float();
            if (codes == KTK_CODES_F32) {
                memcpy(row + 4 * k, &value, 4);
                a->value[m][k] = value;
            } else if (codes == KTK_CODES_BF16) {
                uint32_t bits;
                memcpy(&bits, &value, 4);
                bits &= 0xffff0000u;
                float rounded;
                memcpy(&rounded, &bits, 4);
                const uint16_t half = (uint16_t)(bits >> 16);
                memcpy(row + 2 * k, &half, 2);
                a->value[m][k] = rounded;
            } else {
                /* Extremes in the first row: sums of products must not saturate. */
                const int code = m ? (int)lrintf(127 * value) : k / 16 % 2 ? 127 : -127;
                row[k] = (uint8_t)(int8_t)code;
                int32_t *sum = &sums[m * (K / 16) + k / 16];
                *sum = (k % 16 ? *sum : 0) + code;
                a->value[m][k] =
                    (double)code * (double)scales[m * groups + k / w->activation_group];
            }
        }
    }
}

/* -- what is tested
 * -------------------------------------------------------------------------------------------- */

typedef struct {
    float codes[MAX_K][KTK_PANEL], scales[MAX_K][KTK_PANEL], minima[MAX_K][KTK_PANEL];
} unpacked;

static void unpack(const ktk_kernels *kernels, const ktk_matrix *w, const uint8_t *panel,
                   unpacked *u) {
    memset(u, 0, sizeof *u);
    uint8_t *work = last(&work_pages, 64 * (size_t)w->padded_in);
    kernels->unpack(w, panel, u->codes[0], u->scales[0], u->minima[0], work);
}

static float weight_of(const ktk_format_row *f, const unpacked *u, int k, int n) {
    if (f->is_float) return u->codes[k][n];
    return u->codes[k][n] * u->scales[k / f->fine][n] + u->minima[k / f->fine][n];
}

static uint8_t *repacked(const ktk_kernels *kernels, const ktk_matrix *w, const uint8_t *panels,
                         int num_panels) {
    const int64_t bytes = w->panel_bytes;
    uint8_t *out = last(&repacked_pages, (size_t)(num_panels * bytes));
    for (int i = 0; i < num_panels; i++) kernels->repack(w, panels + i * bytes, out + i * bytes);
    return out;
}

static void known_blocks_have_known_weights(const ktk_kernels *kernels, int format,
                                            const vector *v) {
    static unpacked u;
    ktk_matrix w = matrix_of(format, v->num_weights, 64);
    uint8_t *panel = last(&panel_pages, (size_t)w.panel_bytes);
    for (int n = 0; n < KTK_PANEL; n++)
        memcpy(panel + n * row_bytes(&w), v->blocks, (size_t)row_bytes(&w));
    for (w.is_repacked = 0; w.is_repacked < 2; w.is_repacked++) {
        unpack(kernels, &w, w.is_repacked ? repacked(kernels, &w, panel, 1) : panel, &u);
        int wrong = 0;
        for (int k = 0; k < v->num_weights; k++)
            for (int n = 0; n < KTK_PANEL; n++) {
                float expected;
                memcpy(&expected, &v->weights[k], 4);
                wrong += weight_of(&ktk_formats[format], &u, k, n) != expected;
            }
        CHECK(wrong == 0, "%s on %s: %d weights, repacked %d", v->name, kernels->name, wrong,
              w.is_repacked);
    }
}

static void rows_of_weights_stay_apart(const ktk_kernels *kernels, const ktk_matrix *w,
                                       uint8_t *panel) {
    static unpacked u, rotated;
    const size_t bytes = (size_t)row_bytes(w);
    uint8_t *first = malloc(bytes);
    unpack(kernels, w, panel, &u);
    memcpy(first, panel, bytes);
    memmove(panel, panel + bytes, bytes * (KTK_PANEL - 1));
    memcpy(panel + bytes * (KTK_PANEL - 1), first, bytes);
    free(first);
    unpack(kernels, w, panel, &rotated);
    int wrong = 0;
    for (int k = 0; k < w->padded_in; k++)
        for (int n = 0; n < KTK_PANEL; n++)
            wrong += weight_of(&ktk_formats[w->format], &u, k, (n + 1) % KTK_PANEL) !=
                     weight_of(&ktk_formats[w->format], &rotated, k, n);
    CHECK(wrong == 0, "%s on %s: %d weights", ktk_formats[w->format].name, kernels->name, wrong);
}

/* Products in double, and the sum of their sizes, which rounding errors are measured by. */
static void expected_products(const ktk_kernels *kernels, const ktk_matrix *w,
                              const uint8_t *panels, const activations *a,
                              double (*product)[NUM_CHANNELS], double (*size)[NUM_CHANNELS]) {
    static unpacked u;
    const ktk_format_row *f = &ktk_formats[w->format];
    for (int i = 0; i < NUM_PANELS; i++) {
        unpack(kernels, w, panels + i * w->panel_bytes, &u);
        for (int m = 0; m < NUM_ROWS; m++)
            for (int n = 0; n < KTK_PANEL; n++) product[m][16 * i + n] = size[m][16 * i + n] = 0;
        for (int k = 0; k < w->padded_in; k++)
            for (int n = 0; n < KTK_PANEL; n++) {
                const double minimum = f->is_float ? 0 : u.minima[k / f->fine][n];
                const double value =
                    (f->is_float ? 1 : (double)u.scales[k / f->fine][n]) * u.codes[k][n];
                for (int m = 0; m < NUM_ROWS; m++) {
                    product[m][16 * i + n] += (value + minimum) * a->value[m][k];
                    size[m][16 * i + n] += (fabs(value) + fabs(minimum)) * fabs(a->value[m][k]);
                }
            }
    }
}

static size_t work_bytes(const ktk_gemm *gemm, const ktk_matrix *w, int num_rows) {
    const int row = gemm->work.row + w->padded_in / 32 * gemm->work.row_32k;
    return (size_t)(gemm->work.fixed + num_rows * row + 63) / 64 * 64;
}

/* reference: what another ISA gave for the same, if has_reference. */
static void products_are_right(const ktk_kernels *kernels, ktk_matrix w, const uint8_t *panels,
                               const activations *a, float (*reference)[NUM_CHANNELS],
                               int has_reference) {
    static double product[NUM_ROWS][NUM_CHANNELS], size[NUM_ROWS][NUM_CHANNELS];
    const char *name = ktk_formats[w.format].name;
    const ktk_gemm *gemm = &kernels->gemm[w.format];
    const uint8_t *other = repacked(kernels, &w, panels, NUM_PANELS);
    expected_products(kernels, &w, panels, a, product, size);
    int32_t index[NUM_ROWS]; /* all rows, then fewer: batches take them from the end */
    for (int i = 0; i < NUM_ROWS; i++) index[i] = NUM_ROWS - 1 - i;
    for (int c = COUNT(ROW_COUNTS) - 1; c >= 0; c--)
        for (w.is_repacked = 0; w.is_repacked < 2; w.is_repacked++) {
            const int num_rows = ROW_COUNTS[c];
            uint8_t *work = last(&work_pages, work_bytes(gemm, &w, num_rows));
            const size_t floats = (size_t)((num_rows - 1) * OUT_STRIDE + NUM_CHANNELS);
            float *out = last(&out_pages, 4 * floats);
            for (size_t i = 0; i < floats; i++) out[i] = NAN;
            const int32_t *rows = index + NUM_ROWS - num_rows;
            const uint8_t *from = w.is_repacked ? other : panels;
            gemm->run(&(ktk_gemm_args){&w, from, NUM_PANELS, &a->rows, rows, num_rows, out,
                                       OUT_STRIDE, from, work});
            int wrong = 0, other_bits = 0, touched = 0;
            for (int i = 0; i < num_rows; i++) {
                const float *y = out + i * OUT_STRIDE;
                const int m = rows[i];
                for (int n = 0; n < NUM_CHANNELS; n++) {
                    wrong += !(fabs(y[n] - product[m][n]) <= 2e-6 * size[m][n]);
                    if (has_reference) other_bits += memcmp(&y[n], &reference[m][n], 4) != 0;
                }
                for (int n = NUM_CHANNELS; n < OUT_STRIDE && i < num_rows - 1; n++)
                    touched += !isnan(y[n]);
                if (!has_reference) memcpy(reference[m], y, sizeof reference[m]);
            }
            has_reference = 1;
            CHECK(wrong == 0 && other_bits == 0 && touched == 0,
                  "%s on %s: K %d, group %d, %d rows, repacked %d: %d wrong, %d other bits, "
                  "%d between rows",
                  name, kernels->name, w.padded_in, w.activation_group, num_rows, w.is_repacked,
                  wrong, other_bits, touched);
        }
}

int main(void) {
    static activations a;
    static float reference[NUM_ROWS][NUM_CHANNELS];
    panel_pages = guard(NUM_CHANNELS * MAX_K * 4);
    repacked_pages = guard(NUM_CHANNELS * MAX_K * 4);
    row_pages = guard(NUM_ROWS * MAX_K * 4);
    scale_pages = guard(NUM_ROWS * MAX_K * 4);
    sum_pages = guard(NUM_ROWS * MAX_K * 4);
    work_pages = guard(1 << 22);
    out_pages = guard(NUM_ROWS * OUT_STRIDE * 4);
    int num_isas = 0;
    int num_formats = 0;
    for (int format = 0; format < KTK_NUM_FORMATS; format++) {
        const ktk_format_row *f = &ktk_formats[format];
        if (!f->block_weights) continue;
        num_formats++;
        const vector *v = vector_of(f);
        CHECK(v, "no known blocks of %s", f->name);
        if (!v) continue;
        const ktk_kernels *kernels;
        num_isas = 0;
        for (int i = 0; (kernels = kernels_row(i)); i++)
            if (is_here(kernels->name)) {
                known_blocks_have_known_weights(kernels, format, v);
                num_isas++;
            }
        static const int BLOCKS[] = {1, 3};
        static const int GROUPS[] = {32, 64, 128};
        const int unit = f->block_weights < 32 ? 32 : f->block_weights;
        for (int b = 0; b < COUNT(BLOCKS); b++)
            for (int g = 0; g < (f->is_float ? 1 : COUNT(GROUPS)); g++) {
                const ktk_matrix w = matrix_of(format, BLOCKS[b] * unit, GROUPS[g]);
                uint8_t *panels = last(&panel_pages, (size_t)(NUM_PANELS * w.panel_bytes));
                random_panels(&w, v, panels, NUM_PANELS);
                int last_codes = -1;
                for (int i = 0; (kernels = kernels_row(i)); i++) {
                    if (!is_here(kernels->name)) continue;
                    const int codes = kernels->gemm[format].codes_kind;
                    if (codes != last_codes) random_rows(&w, codes, &a);
                    products_are_right(kernels, w, panels, &a, reference, codes == last_codes);
                    last_codes = codes;
                }
                for (int i = 0; (kernels = kernels_row(i)); i++)
                    if (is_here(kernels->name)) rows_of_weights_stay_apart(kernels, &w, panels);
            }
    }
    printf("%d formats, %d ISAs: %d failures\n", num_formats, num_isas, failures);
    return failures || !num_isas;
}
