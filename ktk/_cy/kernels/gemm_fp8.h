/* fp8: e4m3 codes [K][16], and before them one fp32 scale a panel for each group_size k;
 * activations as they are.
 *
 * inner = fma(a[k], code, inner) for k of a group in order, from +0; y = fma(inner, scale, y)
 * (ktk/reference/linear.py).
 *
 * Registers, 256 bit: 8 sums, 2 weights, an activation, 3 constants. Included by gemm.c. */
#include "fp8.h"

INLINE void tile_fp8(const int MR, const int NP, const ktk_matrix *w, const uint8_t *panel,
                     const ktk_rows *rows, const int32_t *index, float *out, int64_t out_stride) {
    const float *a[8];
    UNROLL
    for (int m = 0; m < MR; m++) a[m] = (const float *)(rows->codes + index[m] * rows->code_stride);
    for (int g = 0, k = 0; k < w->padded_in; g++) {
        const int end = k + w->group_size < w->padded_in ? k + w->group_size : w->padded_in;
        VF inner[4][8][PV]; /* fixed sizes: GCC keeps variable ones in memory */
        UNROLL
        for (int p = 0; p < NP; p++) UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) inner[p][m][v] = VF_ZERO();
        for (; k < end; k++) UNROLL
        for (int p = 0; p < NP; p++) {
            VF weights[PV];
            fp8_weights(panel + p * w->panel_bytes + w->code_offset + (int64_t)k * KTK_PANEL,
                        weights);
            UNROLL
            for (int m = 0; m < MR; m++) {
                const VF x = VF_SET(a[m][k]);
                UNROLL
                for (int v = 0; v < PV; v++) inner[p][m][v] = VF_FMA(x, weights[v], inner[p][m][v]);
            }
        }
        UNROLL
        for (int p = 0; p < NP; p++) {
            const VF scale = VF_SET(((const float *)(panel + p * w->panel_bytes))[g]);
            UNROLL
            for (int m = 0; m < MR; m++) UNROLL
            for (int v = 0; v < PV; v++) {
                float *at = out + m * out_stride + p * KTK_PANEL + v * LANES;
                VF_STORE(at, VF_FMA(inner[p][m][v], scale, g ? VF_LOAD(at) : VF_ZERO()));
            }
        }
    }
}

#define FP8_ROWS(MR, NP)                                                                           \
    for (; i + MR <= g->num_rows; i += MR)                                                         \
        tile_fp8(MR, NP, g->w, panel, g->a, g->rows + i,                                           \
                 g->out + i * g->out_stride + p * KTK_PANEL, g->out_stride);

void CAT(ktk_gemm_fp8_, KTK_ISA)(const ktk_gemm_args *g) {
    int p = 0;
    if (g->num_rows <= 3) /* panels side by side fill the latency of a sum */
        for (; p + 4 / PV <= g->num_panels; p += 4 / PV) {
            const uint8_t *panel = g->panels + p * g->w->panel_bytes;
            int i = 0;
            FP8_ROWS(2, 4 / PV)
            FP8_ROWS(1, 4 / PV)
        }
    for (; p < g->num_panels; p++) {
        const uint8_t *panel = g->panels + p * g->w->panel_bytes;
        int i = 0;
#ifdef __AVX512F__
        FP8_ROWS(8, 1)
#endif
        FP8_ROWS(4, 1)
        FP8_ROWS(2, 1)
        FP8_ROWS(1, 1)
    }
}
#undef FP8_ROWS
