/* d W for the packed panels or blocks of W, without a second copy of it: a block of k of some
 * panels is decoded, in second-level cache, and all rows go over it. Integer panels by
 * products_i16.c, all else in fp32 by products_f32.c. */
#include "transposed.h"

/* Floats of decoded weights: they and the rows share the second-level cache. AHEAD: panels that are
 * fetched before. */
enum { ROWS = KTK_TRANSPOSED_ROWS, DECODED = 20 << 10, BLOCK = 64, INTEGER_BLOCK = 128, AHEAD = 4 };
/* Of integer panels: k that are laid down at a time; int16 of a panel's codes and of a row of
 * channels, with what keeps them in different cache sets. */
enum {
    CHANNELS = KTK_I16_PANELS * KTK_PANEL,
    CODES_K = 128,
    CODES_PANEL = CODES_K * KTK_PANEL + 64,
    ROUNDED_ROW = CHANNELS + 32,
    MAX_GROUPS = CODES_K / 32
};
/* A decoded panel, away from the addresses of the one before: equal distances of whole pages share
 * few cache sets. */
#define PANEL_FLOATS(NUM_K) ((int64_t)(NUM_K) * KTK_PANEL + 64)

/* A panel's part that will be decoded soon: pieces of pages, which no prefetcher foresees. */
static void fetch(const ktk_matrix *w, panels_of of, int panel, int first_k, int num_k) {
    if (panel >= of.count || ktk_formats[w->format].block_weights) return;
    const int64_t bytes = w->panel_bytes - w->code_offset;
    const uint8_t *from =
        of.panels + panel * of.step + w->code_offset + bytes * first_k / w->padded_in;
    for (int64_t at = 0; at < bytes * num_k / w->padded_in; at += 64)
        __builtin_prefetch(from + at, 0, 2);
    if (w->group_size < w->padded_in && w->code_offset)
        __builtin_prefetch(of.panels + panel * of.step +
                               (int64_t)w->code_offset * first_k / w->padded_in / 64 * 64,
                           0, 2);
}

/* Codes of a block of k of some panels, and its scales: those of a group of k lie CHANNELS behind
 * those before. */
typedef struct {
    int16_t codes[KTK_I16_PANELS * CODES_PANEL], rounded[ROWS * ROUNDED_ROW];
    float scales[MAX_GROUPS * CHANNELS], largest_scale[MAX_GROUPS], row_scale[ROWS];
} code_block;

/* Panels [0, count) of k [at, at + n), in `group` k. */
static void lay_codes(const ktk_kernels *kernels, const ktk_matrix *w, panels_of of, int at, int n,
                      int group, code_block *to) {
    for (int j = 0; j < of.count; j++) {
        fetch(w, of, j + AHEAD, at, n);
        const uint8_t *panel = of.panels + j * of.step;
        for (int k = 0, g = 0; k < n; k += group, g++)
            kernels->scales(w, panel, at + k, to->scales + g * CHANNELS + j * KTK_PANEL);
        kernels->codes[w->format](w, panel, at, n, to->codes + j * CODES_PANEL);
    }
    if (n <= group) return;
    for (int k = 0, g = 0; k < n; k += group, g++) {
        float *scales = to->scales + g * CHANNELS;
        const float most = kernels->largest(scales, NULL, of.count * KTK_PANEL);
        to->largest_scale[g] = most;
        for (int i = 0; i < of.count * KTK_PANEL; i++) scales[i] *= most > 0 ? 1 / most : 0;
    }
}

/* The product of rows [first, first + rows) with what is laid. One group: rows times scales are
 * rounded by the largest of them; several: by the largest of the row, which all groups share. */
static void multiply_block(const ktk_kernels *kernels, const ktk_product_nt *p, panels_of of,
                           int first, int rows, int k, int n, int group, code_block *block) {
    const int channels = of.count * KTK_PANEL;
    const float *x[ROWS];
    float largest[ROWS];
    for (int m = 0; m < rows; m++) {
        const int64_t row = p->rows ? p->rows[first + m] : first + m;
        x[m] = p->a + row * p->a_stride + of.first * KTK_PANEL;
        largest[m] = kernels->largest(x[m], n > group ? NULL : block->scales, channels);
    }
    for (int done = 0, g = 0; done < n; done += group, g++) {
        for (int m = 0; m < rows; m++) {
            const float most = largest[m];
            /* Below, 32767 / most might overflow; of NaN codes do not count. */
            const float by = most >= 1e-30f ? 32767.0f / most : 0.0f;
            block->row_scale[m] = most / 32767.0f * (n > group ? block->largest_scale[g] : 1.0f);
            if (most < 1e-30f) block->row_scale[m] = 0.0f;
            kernels->round_i16(x[m], by, block->scales + g * CHANNELS, channels,
                               block->rounded + m * ROUNDED_ROW);
        }
        kernels->product_i16(&(ktk_product_i16){.a = block->rounded,
                                                .b = block->codes + done * KTK_PANEL,
                                                .scales = block->row_scale,
                                                .c = p->c + first * p->c_stride + k + done,
                                                .a_stride = ROUNDED_ROW,
                                                .b_panel = CODES_PANEL,
                                                .c_stride = p->c_stride,
                                                .num_rows = rows,
                                                .num_columns = min_int(group, n - done),
                                                .num_panels = of.count,
                                                .is_added = p->is_added});
    }
}

/* p's c[m][0 .. num_columns) (+)= sum over the panels' channels of a[rows[m]] * W[., first_k + j],
 * a the whole projection's; from then on p adds. Integer panels: codes are multiplied as they are,
 * a times their scales is rounded to 16 bits for each group of k (products_i16.c). */
static void multiply_codes(const ktk_kernels *kernels, const ktk_matrix *w, panels_of of,
                           int first_k, ktk_product_nt *p, code_block *block) {
    const int group = min_int(w->group_size, CODES_K);
    for (int i = 0; i < of.count; i += KTK_I16_PANELS) {
        const panels_of some = {of.panels + i * of.step, of.step, of.first + i,
                                min_int(KTK_I16_PANELS, of.count - i)};
        for (int k = 0; k < p->num_columns; k += CODES_K) {
            const int n = min_int(CODES_K, p->num_columns - k);
            lay_codes(kernels, w, some, first_k + k, n, group, block);
            for (int first = 0; first < p->num_rows; first += ROWS)
                multiply_block(kernels, p, some, first, min_int(ROWS, p->num_rows - first), k, n,
                               group, block);
        }
        p->is_added = 1;
    }
}

/* The same; of others some panels are decoded to fp32 at a time. */
void ktk_multiply_transposed(const ktk_kernels *kernels, const ktk_matrix *w, panels_of of,
                             int first_k, ktk_product_nt *p, float *decoded) {
    if (kernels->codes[w->format]) {
        multiply_codes(kernels, w, of, first_k, p, (code_block *)decoded);
        return;
    }
    ktk_decode_fn *decode = kernels->decode[w->format];
    const int most = max_int(1, (int)(DECODED / PANEL_FLOATS(p->num_columns)));
    for (int i = 0; i < of.count; i += most) {
        ktk_product_nt some = *p;
        some.a += (of.first + i) * KTK_PANEL;
        some.b = decoded;
        some.b_panel = PANEL_FLOATS(p->num_columns);
        some.b_column = KTK_PANEL;
        some.num_panels = min_int(most, of.count - i);
        for (int j = 0; j < some.num_panels; j++) {
            fetch(w, of, i + j + AHEAD, first_k, p->num_columns);
            decode(w, of.panels + (i + j) * of.step, first_k, p->num_columns,
                   decoded + j * some.b_panel);
        }
        kernels->product_nt(&some);
        p->is_added = 1;
    }
}

int64_t ktk_transposed_floats(void) { return max_int(DECODED, (int)(sizeof(code_block) / 4)); }

int ktk_transposed_block(const ktk_kernels *kernels, const ktk_matrix *w) {
    const int least = kernels->codes[w->format] ? INTEGER_BLOCK : BLOCK;
    return max_int(least, max_int(ktk_formats[w->format].block_weights, w->rotation));
}
