/* Codes of checkpoints as they are (coded.h), activations fp32.
 *
 * inner = fma(a[k], value of the code, inner) for k of a group in order, from
 * +0; y = fma(inner, scale, y) (ktk/reference/linear.py).
 *
 * One and two rows multiply what has just been decoded, in registers: several
 * panels side by side fill the latency of a sum. 256 bit: 8 sums, 4 weights, an
 * activation, 3 constants. Of more rows CHUNK_K k of a panel are decoded once,
 * to L1, and every tile of rows goes over them.
 *
 * Included by gemm.c. */
#include "coded.h"

enum {
    CHUNK_K = 128, /* 8 KiB of values */
    LEAST_GROUP = 16,
    CHUNK_SCALES = CHUNK_K / LEAST_GROUP,
    CODED_WORK = 4 * KTK_PANEL * (CHUNK_K + CHUNK_SCALES)
};

/* Group g of NP panels is over: y = fma(inner, scale, y), y in out. */
INLINE void add_group(const int MR, const int NP, const int FORMAT, const ktk_matrix *w,
                      const uint8_t *panel, int g, VF inner[4][4][PV], float *out,
                      int64_t out_stride) {
    UNROLL
    for (int p = 0; p < NP; p++) {
        VF scale[PV];
        coded_scales(FORMAT, w, panel + p * w->panel_bytes, g, scale);
        UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) {
            float *at = out + m * out_stride + p * KTK_PANEL + v * LANES;
            VF_STORE(at, VF_FMA(inner[p][m][v], scale[v], g ? VF_LOAD(at) : VF_ZERO()));
        }
    }
}

INLINE void tile_coded(const int MR, const int NP, const int FORMAT, const ktk_matrix *w,
                       const uint8_t *panel, const ktk_rows *rows, const int32_t *index, float *out,
                       int64_t out_stride) {
    const float *a[4];
    UNROLL
    for (int m = 0; m < MR; m++) a[m] = (const float *)(rows->codes + index[m] * rows->code_stride);
    const tables_4 tables = tables_of(FORMAT);
    for (int g = 0, k = 0; k < w->padded_in; g++) {
        const int end = k + w->group_size < w->padded_in ? k + w->group_size : w->padded_in;
        VF inner[4][4][PV], zero[4][PV]; /* fixed sizes: GCC keeps variable ones in memory */
        UNROLL
        for (int p = 0; p < NP; p++) UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) inner[p][m][v] = VF_ZERO();
        if (FORMAT == KTK_INT4_ASYM) UNROLL
        for (int p = 0; p < NP; p++) zero_points(w, panel + p * w->panel_bytes, g, zero[p]);
        if (!has_4_bits(FORMAT)) {
            for (; k < end; k += 2) UNROLL
            for (int p = 0; p < NP; p++) {
                const uint8_t *codes = panel + p * w->panel_bytes + w->code_offset;
                VF weights[2][PV];
                fp8_two(FORMAT, codes + (int64_t)k * KTK_PANEL, weights);
                UNROLL
                for (int i = 0; i < 2; i++) UNROLL
                for (int m = 0; m < MR; m++) {
                    const VF x = VF_SET(a[m][k + i]);
                    UNROLL
                    for (int v = 0; v < PV; v++)
                        inner[p][m][v] = VF_FMA(x, weights[i][v], inner[p][m][v]);
                }
            }
        } else {
            for (; k < end; k += 8) UNROLL
            for (int p = 0; p < NP; p++) UNROLL
            for (int v = 0; v < PV; v++) {
                const uint8_t *codes = panel + p * w->panel_bytes + w->code_offset;
                const VI both = load_4(&tables, codes + (int64_t)k * 8 + v * 4 * LANES);
                UNROLL
                for (int half = 0; half < 2; half++) {
                    VF weights[4];
                    four_weights(&tables, both, half, weights);
                    UNROLL
                    for (int i = 0; i < 4; i++) {
                        if (FORMAT == KTK_INT4_ASYM) weights[i] = VF_SUB(weights[i], zero[p][v]);
                        UNROLL
                        for (int m = 0; m < MR; m++)
                            inner[p][m][v] =
                                VF_FMA(VF_SET(a[m][k + 4 * half + i]), weights[i], inner[p][m][v]);
                    }
                }
            }
        }
        add_group(MR, NP, FORMAT, w, panel, g, inner, out, out_stride);
    }
}

/* k [first, first + num_k) of a panel as values [num_k][16], and its groups'
 * scales [16]: of whole groups, or within the only one. */
typedef struct {
    const float *values, *scales;
    int first, num_k;
} decoded_chunk;

INLINE void tile_decoded(const int MR, const ktk_matrix *w, const decoded_chunk *c,
                         const ktk_rows *rows, const int32_t *index, float *out,
                         int64_t out_stride) {
    const float *a[8];
    UNROLL
    for (int m = 0; m < MR; m++)
        a[m] = (const float *)(rows->codes + index[m] * rows->code_stride) + c->first;
    const int is_whole = w->group_size <= CHUNK_K, ends = c->first + c->num_k == w->padded_in;
    const float *scales = c->scales;
    for (int k = 0; k < c->num_k; scales += KTK_PANEL) {
        const int end = k + w->group_size < c->num_k ? k + w->group_size : c->num_k;
        VF inner[8][PV]; /* fixed sizes: GCC keeps variable ones in memory */
        UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++)
            inner[m][v] =
                is_whole || !c->first ? VF_ZERO() : VF_LOAD(out + m * out_stride + v * LANES);
        const int begin = c->first + k;
        for (; k < end; k++) {
            VF weights[PV];
            UNROLL
            for (int v = 0; v < PV; v++)
                weights[v] = VF_LOAD(c->values + k * KTK_PANEL + v * LANES);
            UNROLL
            for (int m = 0; m < MR; m++) {
                const VF x = VF_SET(a[m][k]);
                UNROLL
                for (int v = 0; v < PV; v++) inner[m][v] = VF_FMA(x, weights[v], inner[m][v]);
            }
        }
        UNROLL
        for (int v = 0; v < PV; v++) {
            const VF scale = VF_LOAD(scales + v * LANES);
            UNROLL
            for (int m = 0; m < MR; m++) {
                float *at = out + m * out_stride + v * LANES;
                const VF before = is_whole && begin ? VF_LOAD(at) : VF_ZERO();
                if (is_whole || ends) inner[m][v] = VF_FMA(inner[m][v], scale, before);
                VF_STORE(at, inner[m][v]);
            }
        }
    }
}

INLINE void panel_by_chunks(const int FORMAT, const ktk_gemm_args *g, const uint8_t *panel,
                            float *out) {
    const ktk_matrix *w = g->w;
    float *const values = (float *)g->work, *const scales = values + CHUNK_K * KTK_PANEL;
    for (int first = 0; first < w->padded_in; first += CHUNK_K) {
        const int num_k = w->padded_in - first < CHUNK_K ? w->padded_in - first : CHUNK_K;
        const decoded_chunk c = {values, scales, first, num_k};
        coded_values(FORMAT, w, panel, first, num_k, values);
        for (int k = 0, i = 0; k < num_k; k += w->group_size, i++) {
            VF scale[PV];
            coded_scales(FORMAT, w, panel, (first + k) / w->group_size, scale);
            UNROLL
            for (int v = 0; v < PV; v++) VF_STORE(scales + i * KTK_PANEL + v * LANES, scale[v]);
        }
        int i = 0;
#define CHUNK_ROWS(MR)                                                                             \
    for (; i + MR <= g->num_rows; i += MR)                                                         \
        tile_decoded(MR, w, &c, g->a, g->rows + i, out + i * g->out_stride, g->out_stride);
#ifdef __AVX512F__
        CHUNK_ROWS(8)
#endif
        CHUNK_ROWS(4)
        CHUNK_ROWS(2)
        CHUNK_ROWS(1)
#undef CHUNK_ROWS
    }
}

INLINE void gemm_coded(const int FORMAT, const ktk_gemm_args *g) {
    const int64_t panel_bytes = g->w->panel_bytes;
    int p = 0;
    if (g->num_rows > 2) {
        for (; p < g->num_panels; p++)
            panel_by_chunks(FORMAT, g, g->panels + p * panel_bytes, g->out + p * KTK_PANEL);
        return;
    }
#define DIRECT(MR, NP)                                                                             \
    for (; p + (NP) <= g->num_panels; p += NP)                                                     \
        tile_coded(MR, NP, FORMAT, g->w, g->panels + p * panel_bytes, g->a, g->rows,               \
                   g->out + p * KTK_PANEL, g->out_stride);
    if (g->num_rows == 1) {
        DIRECT(1, 4)
        DIRECT(1, 1)
    } else {
        DIRECT(2, 2)
        DIRECT(2, 1)
    }
#undef DIRECT
}

#define GEMM_CODED(ENUM, NAME)                                                                     \
    void CAT(ktk_gemm_##NAME##_, KTK_ISA)(const ktk_gemm_args *g) { gemm_coded(KTK_##ENUM, g); }
KTK_CODED_FORMATS(GEMM_CODED)
