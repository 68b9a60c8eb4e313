/* y[row][channel] of 16-channel panels, for every weight format; compiled once per ISA row.
 *
 * Integer formats, per channel lane: acc = -z * sum(a) + sum(a * u) exactly in int32 per fine group;
 * inner = fma(acc, fine scale, inner) over the coarse group; y = fma(inner, coarse scale, y). Nothing else
 * touches the sum, so every row, tile size and vector width gives the same bits (ktk/reference/linear.py).
 *
 * Tiles: MR rows x NP panels. 512 bit: one zmm a panel row, MR=8 keeps 8 acc + 8 inner in registers. 256 bit:
 * two ymm, MR=4. Loop order: panels, rows in tiles, k: a panel's codes stay in L1/L2 over all rows.
 * VPDPBUSD, VPMADDUBSW, VPMADDWD: Intel SDM vol. 2. */
#include <string.h>

#include "ktk.h"
#include "vec.h"

INLINE int32_t load32(const uint8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}

/* 32 k of one panel against MR rows: acc += sum of codes products. at: k of the first. */
INLINE void dot32(const int MR, const int FORMAT, const uint8_t *codes, const uint8_t *const *a, int at,
                  VI acc[MR][PV]) {
#ifdef __AVX512VNNI__
    if (FORMAT == KTK_INT8) {
        UNROLL
        for (int r = 0; r < 8; r++) {
            VI w = VI_LOAD(codes + 64 * r);
            UNROLL
            for (int m = 0; m < MR; m++)
                acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], w, VI_SET32(load32(a[m] + at + 4 * r)));
        }
    } else {
        VI mask = VI_SET8(15);
        UNROLL
        for (int r = 0; r < 4; r++) {
            VI w = VI_LOAD(codes + 64 * r);
            VI low = VI_AND(w, mask), high = VI_AND(VI_SRL16(w, 4), mask);
            UNROLL
            for (int m = 0; m < MR; m++)
                acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], low, VI_SET32(load32(a[m] + at + 8 * r)));
            UNROLL
            for (int m = 0; m < MR; m++)
                acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], high, VI_SET32(load32(a[m] + at + 8 * r + 4)));
        }
    }
#else
    if (FORMAT == KTK_INT8) { /* widen, not maddubs: 255*127*2 overflows i16; a is int16, k order 0 2 1 3 */
        VI mask = VI_SET16(255);
        for (int r = 0; r < 8; r++) UNROLL
        for (int v = 0; v < PV; v++) {
            VI w = VI_LOAD(codes + 64 * r + 32 * v);
            VI even = VI_AND(w, mask), odd = VI_SRL16(w, 8);
            UNROLL
            for (int m = 0; m < MR; m++) {
                const uint8_t *pair = a[m] + 2 * at + 8 * r;
                VI sum =
                    VI_ADD32(VI_MADD(even, VI_SET32(load32(pair))), VI_MADD(odd, VI_SET32(load32(pair + 4))));
                acc[m][v] = VI_ADD32(acc[m][v], sum);
            }
        }
    } else { /* eight maddubs of nibbles fit i16: 15*127*2*8 = 30480 */
        VI mask = VI_SET8(15), ones = VI_SET16(1);
        UNROLL
        for (int v = 0; v < PV; v++) {
            VI sum[MR];
            UNROLL
            for (int m = 0; m < MR; m++) sum[m] = VI_ZERO();
            for (int r = 0; r < 4; r++) {
                VI w = VI_LOAD(codes + 64 * r + 32 * v);
                VI low = VI_AND(w, mask), high = VI_AND(VI_SRL16(w, 4), mask);
                UNROLL
                for (int m = 0; m < MR; m++) {
                    const uint8_t *quad = a[m] + at + 8 * r;
                    sum[m] = VI_ADD16(sum[m], VI_MADDUBS(low, VI_SET32(load32(quad))));
                    sum[m] = VI_ADD16(sum[m], VI_MADDUBS(high, VI_SET32(load32(quad + 4))));
                }
            }
            UNROLL
            for (int m = 0; m < MR; m++) acc[m][v] = VI_ADD32(acc[m][v], VI_MADD(sum[m], ones));
        }
    }
#endif
}

INLINE VF weight_scale(const ktk_matrix *w, const uint8_t *scales, int k, int v) {
    int64_t at = (int64_t)(k / w->group_size) * KTK_PANEL + v * LANES;
    if (w->scales_are_bf16) return VF_BITS(VI_SLL32(VI_BF16(scales + 2 * at), 16));
    return VF_LOAD(scales + 4 * at);
}

INLINE void tile_integer(const int MR, const int NP, const int FORMAT, const int WEIGHT_IS_FINE,
                         const ktk_matrix *w, const uint8_t *panel, const ktk_rows *rows,
                         const int32_t *index, float *out, int64_t out_stride) {
    const int code_bytes_32k = FORMAT == KTK_INT8 ? 512 : 256;
    const int num_k = w->padded_in;
    const int fine = WEIGHT_IS_FINE ? w->group_size : w->activation_group;
    const int coarse = WEIGHT_IS_FINE ? w->activation_group : w->group_size;
    const uint8_t *a[MR];
    const float *a_scale[MR];
    const int32_t *correction[MR];
    UNROLL
    for (int m = 0; m < MR; m++) {
        a[m] = rows->codes + index[m] * rows->code_stride;
        a_scale[m] = rows->scales + index[m] * rows->scale_stride;
        correction[m] = rows->correction + index[m] * rows->correction_stride;
    }
    VF y[NP][MR][PV];
    UNROLL
    for (int p = 0; p < NP; p++) UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++) y[p][m][v] = VF_ZERO();
    for (int c = 0, c_index = 0, f_index = 0; c < num_k; c += coarse, c_index++) {
        const int c_end = c + coarse < num_k ? c + coarse : num_k;
        VF inner[NP][MR][PV];
        UNROLL
        for (int p = 0; p < NP; p++) UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) inner[p][m][v] = VF_ZERO();
        for (int f = c; f < c_end; f += fine, f_index++) {
            const int f_end = f + fine < c_end ? f + fine : c_end;
            UNROLL
            for (int p = 0; p < NP; p++) {
                const uint8_t *codes = panel + p * w->panel_bytes;
                VI acc[MR][PV];
                UNROLL
                for (int m = 0; m < MR; m++) UNROLL
                for (int v = 0; v < PV; v++) acc[m][v] = VI_SET32(correction[m][f_index]);
                for (int k = f; k < f_end; k += 32)
                    dot32(MR, FORMAT, codes + (k / 32) * code_bytes_32k, a, k, acc);
                UNROLL
                for (int v = 0; v < PV; v++) {
                    VF scale = VF_ZERO();
                    if (WEIGHT_IS_FINE) scale = weight_scale(w, codes + w->code_bytes, f, v);
                    UNROLL
                    for (int m = 0; m < MR; m++) {
                        if (!WEIGHT_IS_FINE) scale = VF_SET(a_scale[m][f_index]);
                        inner[p][m][v] = VF_FMA(VF_CVT(acc[m][v]), scale, inner[p][m][v]);
                    }
                }
            }
        }
        UNROLL
        for (int p = 0; p < NP; p++) UNROLL
        for (int v = 0; v < PV; v++) {
            VF scale = VF_ZERO();
            if (!WEIGHT_IS_FINE) scale = weight_scale(w, panel + p * w->panel_bytes + w->code_bytes, c, v);
            UNROLL
            for (int m = 0; m < MR; m++) {
                if (WEIGHT_IS_FINE) scale = VF_SET(a_scale[m][c_index]);
                y[p][m][v] = VF_FMA(inner[p][m][v], scale, y[p][m][v]);
            }
        }
    }
    UNROLL
    for (int p = 0; p < NP; p++) UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++) VF_STORE(out + m * out_stride + p * KTK_PANEL + v * LANES, y[p][m][v]);
}

/* y = fma(a[k], w[k], y) for k in order. */
INLINE void tile_float(const int MR, const int NP, const int FORMAT, const int WEIGHT_IS_FINE,
                       const ktk_matrix *w, const uint8_t *panel, const ktk_rows *rows, const int32_t *index,
                       float *out, int64_t out_stride) {
    (void)WEIGHT_IS_FINE;
    const float *a[MR];
    UNROLL
    for (int m = 0; m < MR; m++) a[m] = (const float *)(rows->codes + index[m] * rows->code_stride);
    VF y[NP][MR][PV];
    UNROLL
    for (int p = 0; p < NP; p++) UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++) y[p][m][v] = VF_ZERO();
    VI high = VI_SET32((int)0xffff0000);
    for (int k = 0; k < w->padded_in; k += 2) UNROLL
    for (int p = 0; p < NP; p++) UNROLL
    for (int v = 0; v < PV; v++) {
        const uint8_t *codes = panel + p * w->panel_bytes;
        VF even, odd;
        if (FORMAT == KTK_BF16) {
            VI both = VI_LOAD(codes + (int64_t)k * 32 + v * 32);
            even = VF_BITS(VI_SLL32(both, 16));
            odd = VF_BITS(VI_AND(both, high));
        } else {
            even = VF_LOAD(codes + (int64_t)k * 64 + v * 32);
            odd = VF_LOAD(codes + (int64_t)k * 64 + 64 + v * 32);
        }
        UNROLL
        for (int m = 0; m < MR; m++) {
            y[p][m][v] = VF_FMA(VF_SET(a[m][k]), even, y[p][m][v]);
            y[p][m][v] = VF_FMA(VF_SET(a[m][k + 1]), odd, y[p][m][v]);
        }
    }
    UNROLL
    for (int p = 0; p < NP; p++) UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++) VF_STORE(out + m * out_stride + p * KTK_PANEL + v * LANES, y[p][m][v]);
}

/* Four panels at a time where few rows leave registers and latency to fill, then one by one. */
#define ROWS_OF(TILE, MR, NP, FORMAT, FINE)                                                                  \
    for (; i + MR <= num_rows; i += MR)                                                                      \
        TILE(MR, NP, FORMAT, FINE, w, panel, a, rows + i, out + i * out_stride + p * KTK_PANEL, out_stride);

#ifdef __AVX512F__
#define ALL_ROWS(TILE, NP, FORMAT, FINE)                                                                     \
    if (NP == 1) {                                                                                           \
        ROWS_OF(TILE, 8, 1, FORMAT, FINE)                                                                    \
    }                                                                                                        \
    if (NP <= 2) {                                                                                           \
        ROWS_OF(TILE, 4, NP, FORMAT, FINE)                                                                   \
    }                                                                                                        \
    ROWS_OF(TILE, 2, NP, FORMAT, FINE)                                                                       \
    ROWS_OF(TILE, 1, NP, FORMAT, FINE)
#else
#define ALL_ROWS(TILE, NP, FORMAT, FINE)                                                                     \
    if (NP == 1) {                                                                                           \
        ROWS_OF(TILE, 4, 1, FORMAT, FINE)                                                                    \
    }                                                                                                        \
    ROWS_OF(TILE, 2, NP, FORMAT, FINE)                                                                       \
    ROWS_OF(TILE, 1, NP, FORMAT, FINE)
#endif

#define GEMM(NAME, TILE, FORMAT, FINE)                                                                       \
    static void NAME(const ktk_matrix *w, const uint8_t *panels, int num_panels, const ktk_rows *a,          \
                     const int32_t *rows, int num_rows, float *out, int64_t out_stride, uint8_t *work) {     \
        (void)work;                                                                                          \
        int p = 0;                                                                                           \
        if (num_rows <= 3)                                                                                   \
            for (; p + 4 / PV <= num_panels; p += 4 / PV) {                                                  \
                const uint8_t *panel = panels + p * w->panel_bytes;                                          \
                int i = 0;                                                                                   \
                ALL_ROWS(TILE, 4 / PV, FORMAT, FINE)                                                         \
            }                                                                                                \
        for (; p < num_panels; p++) {                                                                        \
            const uint8_t *panel = panels + p * w->panel_bytes;                                              \
            int i = 0;                                                                                       \
            ALL_ROWS(TILE, 1, FORMAT, FINE)                                                                  \
        }                                                                                                    \
    }

GEMM(int4_weight_fine, tile_integer, KTK_INT4, 1)
GEMM(int4_activation_fine, tile_integer, KTK_INT4, 0)
GEMM(int8_activation_fine, tile_integer, KTK_INT8, 0)
GEMM(int8_weight_fine, tile_integer, KTK_INT8, 1)
GEMM(CAT(ktk_gemm_bf16_, KTK_ISA), tile_float, KTK_BF16, 0)
GEMM(CAT(ktk_gemm_fp32_, KTK_ISA), tile_float, KTK_FP32, 0)

/* gemm_amx.c. By counted instructions it is ahead from 4 rows with groups of 128 k, from 7 with groups of 32; the
 * whole tile of 8 rows stays here, where the count is close and needs no model of a CPU nobody measured. */
#ifdef __AMX_INT8__
enum { TILE_MIN_ROWS = 9 };
ktk_gemm_fn CAT(ktk_gemm_tiles_, KTK_ISA);
#define GEMM_ON_TILES                                                                                        \
    if (num_rows >= TILE_MIN_ROWS) {                                                                         \
        CAT(ktk_gemm_tiles_, KTK_ISA)(w, panels, num_panels, a, rows, num_rows, out, out_stride, work);      \
        return;                                                                                              \
    }
#else
#define GEMM_ON_TILES
#endif

static void CAT(ktk_gemm_int4_, KTK_ISA)(const ktk_matrix *w, const uint8_t *panels, int num_panels,
                                         const ktk_rows *a, const int32_t *rows, int num_rows, float *out,
                                         int64_t out_stride, uint8_t *work) {
    GEMM_ON_TILES(w->group_size <= w->activation_group ? int4_weight_fine : int4_activation_fine)(
        w, panels, num_panels, a, rows, num_rows, out, out_stride, work);
}

static void CAT(ktk_gemm_int8_, KTK_ISA)(const ktk_matrix *w, const uint8_t *panels, int num_panels,
                                         const ktk_rows *a, const int32_t *rows, int num_rows, float *out,
                                         int64_t out_stride, uint8_t *work) {
    GEMM_ON_TILES(w->group_size <= w->activation_group ? int8_weight_fine : int8_activation_fine)(
        w, panels, num_panels, a, rows, num_rows, out, out_stride, work);
}

/* Elementwise kernels of this row, in rows.c. */
void CAT(ktk_quantise_, KTK_ISA)(const float *, int, int, int, int, int, uint8_t *, float *, int32_t *);
void CAT(ktk_activate_, KTK_ISA)(const ktk_activation *, float *, int, const float *, const float *, float *);
void CAT(ktk_load_, KTK_ISA)(int, const void *, int64_t, float *);
void CAT(ktk_store_, KTK_ISA)(int, const float *, int64_t, void *);
void CAT(ktk_add_scaled_, KTK_ISA)(float *, const float *, float, int64_t);
void CAT(ktk_add_, KTK_ISA)(float *, const float *, int64_t);
int CAT(ktk_pack_panel_, KTK_ISA)(const ktk_matrix *, int, const void *const *, int, const float *, int, int,
                                  float *, uint8_t *);

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
const ktk_kernels CAT(ktk_kernels_, KTK_ISA) = {
    .name = TEXT(KTK_ISA),
    .gemm = {CAT(ktk_gemm_int4_, KTK_ISA), CAT(ktk_gemm_int8_, KTK_ISA), CAT(ktk_gemm_bf16_, KTK_ISA),
             CAT(ktk_gemm_fp32_, KTK_ISA)},
#ifdef __AVX512VNNI__
    .codes_kind = {KTK_CODES_I8, KTK_CODES_I8, KTK_CODES_F32, KTK_CODES_F32},
#else
    .codes_kind = {KTK_CODES_I8, KTK_CODES_I16, KTK_CODES_F32, KTK_CODES_F32},
#endif
    .quantise = CAT(ktk_quantise_, KTK_ISA),
    .activate = CAT(ktk_activate_, KTK_ISA),
    .load = CAT(ktk_load_, KTK_ISA),
    .store = CAT(ktk_store_, KTK_ISA),
    .add_scaled = CAT(ktk_add_scaled_, KTK_ISA),
    .add = CAT(ktk_add_, KTK_ISA),
    .pack_panel = CAT(ktk_pack_panel_, KTK_ISA),
};
