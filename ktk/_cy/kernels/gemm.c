/* y[row][channel] of 16-channel panels, for every weight format; compiled once per ISA row.
 *
 * Integer formats, per channel lane: acc = -z * sum(a) + sum(a * u) exactly in int32 per fine
 * group; inner = fma(acc, fine scale, inner) over the coarse group; y = fma(inner, coarse scale,
 * y). Nothing else touches the sum, so every row, tile size and vector width gives the same bits
 * (ktk/reference/linear.py).
 *
 * The rows of a call are split into tiles of at most MAX_ROWS and copied to `work`, a tile's rows
 * side by side for every four k: one stream of memory, one address register, every activation an
 * embedded broadcast. Loop order: panels, tiles, k. While the tiles run over a panel, the next
 * panel is fetched.
 *
 * VPDPBUSD, VPMADDUBSW, VPMADDWD: Intel SDM vol. 2.
 *
 * Symbols: ktk_gemm_int4_avx2 ktk_gemm_int4_avx512 ktk_gemm_int4_avx512vnni ktk_gemm_int8_avx2
 *   ktk_gemm_int8_avx512 ktk_gemm_int8_avx512vnni ktk_gemm_bf16_avx2 ktk_gemm_bf16_avx512
 *   ktk_gemm_bf16_avx512vnni ktk_gemm_fp32_avx2 ktk_gemm_fp32_avx512 ktk_gemm_fp32_avx512vnni.
 * Of gemm_levels.h:
 *   ktk_gemm_nl2_avx2 ktk_gemm_nl2_avx512 ktk_gemm_nl2_avx512vnni ktk_gemm_nl3_avx2
 *   ktk_gemm_nl3_avx512 ktk_gemm_nl3_avx512vnni ktk_gemm_nl4_avx2 ktk_gemm_nl4_avx512
 *   ktk_gemm_nl4_avx512vnni. */
#include <string.h>

#include "interleave.h"
#include "ktk_kernels.h"
#include "row.h"
#include "vec.h"

/* Rows of a tile: the most, and the best where there are more. 512 bit: integer and float sums of 8
 * rows, weights, mask and scales fit 32 registers with room to begin the next group; 12 rows are
 * 4-7 % slower. 256 bit: 4 rows fit, but up to 6 in one tile beat two tiles. */
#ifdef __AVX512F__
#define MAX_ROWS 8
#define MOST_LEVEL_ROWS 8
#define DIRECT_ROWS 4 /* of gemm_levels.h */
enum { BEST_ROWS = 8 };
#else
#define MAX_ROWS 6
#define MOST_LEVEL_ROWS 3 /* of gemm_levels.h: three sums of 16 bits and three of 32, twice */
#define DIRECT_ROWS 5     /* of one tile, though sums of 32 bits wait in memory: 12 % at 5 rows */
enum { BEST_ROWS = 4 };
#endif
#ifdef __AVX512VNNI__
enum { INT8_UNIT = 4 }; /* bytes of four activation codes */
#else
enum { INT8_UNIT = 8 };
#endif

/* Rows of a call, and the work that they take: codes of two bytes at most, a scale and a sum for
 * each 32, and what interleave touches behind them. */
enum { CALL_ROWS = 64 };
#define BLOCK_SIZES .fewest_rows = CALL_ROWS, .most_rows = CALL_ROWS, .work = {4096, 64, 128}

/* Tiles of so few rows go over a panel so fast that the CPU's own prefetcher keeps ahead of them,
 * and any help only costs: one row, one core, int4 24 -> 32, int8 22 -> 34 GB/s without. */
#define STREAMED_ROWS(FORMAT) (PV == 1 && (FORMAT) == KTK_INT8 ? 4 : 2)

/* Which scale multiplies the integer sum; EQUAL: both groups have one size, the weight's scale
 * comes first. */
enum { WEIGHT_FINE, ACTIVATION_FINE, EQUAL };

typedef struct {
    const uint8_t *codes;      /* [padded_in / 4][rows][unit] */
    const float *scales;       /* [activation groups][rows] */
    const int32_t *correction; /* [fine groups][rows] */
} tile_rows;

INLINE int32_t load32(const uint8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}

INLINE void prefetch(const uint8_t *p, int bytes) {
    UNROLL
    for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)p + i, _MM_HINT_T1);
}

/* Sums of a row that run side by side where few rows would leave VPDPBUSD waiting for its own
 * result. */
#ifdef __AVX512VNNI__
#define CHAINS(MR) ((MR) == 1 ? 4 : (MR) < 4 ? 2 : 1)
#else
#define CHAINS(MR) 1
#endif

/* 32 k of one panel against MR rows: acc += sum of code products. a: first of the rows' codes. */
INLINE void dot32(const int MR, const int FORMAT, const uint8_t *codes, const uint8_t *a,
                  VI acc[MAX_ROWS][PV]) {
#ifdef __AVX512VNNI__
    if (FORMAT == KTK_INT8) {
        UNROLL
        for (int r = 0; r < 8; r++) {
            VI w = VI_LOAD(codes + 64 * r);
            UNROLL
            for (int m = 0; m < MR; m++)
                VI_DOT_BROADCAST(acc[m + r % CHAINS(MR) * MR][0], w, a + 4 * (MR * r + m));
        }
    } else {
        VI mask = VI_SET8(15);
        UNROLL
        for (int r = 0; r < 4; r++) {
            VI w = VI_LOAD(codes + 64 * r);
            VI low = VI_AND(w, mask), high = VI_AND(VI_SRL16(w, 4), mask);
            UNROLL
            for (int m = 0; m < MR; m++)
                VI_DOT_BROADCAST(acc[m + 2 * r % CHAINS(MR) * MR][0], low,
                                 a + 4 * (MR * 2 * r + m));
            UNROLL
            for (int m = 0; m < MR; m++)
                VI_DOT_BROADCAST(acc[m + (2 * r + 1) % CHAINS(MR) * MR][0], high,
                                 a + 4 * (MR * (2 * r + 1) + m));
        }
    }
#else
    if (FORMAT ==
        KTK_INT8) { /* widen, not maddubs: 255*127*2 overflows i16; a is int16, k order 0 2 1 3 */
        VI mask = VI_SET16(255);
        UNROLL
        for (int r = 0; r < 8; r++) {
            VI even[PV], odd[PV];
            UNROLL
            for (int v = 0; v < PV; v++) {
                VI w = VI_LOAD(codes + 64 * r + 32 * v);
                even[v] = VI_AND(w, mask);
                odd[v] = VI_SRL16(w, 8);
            }
            UNROLL
            for (int m = 0; m < MR; m++) {
                const uint8_t *pair = a + 8 * (MR * r + m);
                VI first = VI_SET32(load32(pair)), second = VI_SET32(load32(pair + 4));
                UNROLL
                for (int v = 0; v < PV; v++) {
                    acc[m][v] = VI_ADD32(acc[m][v], VI_MADD(even[v], first));
                    VI_PIN(acc[m][v]);
                    acc[m][v] = VI_ADD32(acc[m][v], VI_MADD(odd[v], second));
                    VI_PIN(acc[m][v]);
                }
            }
        }
    } else { /* eight maddubs of nibbles fit i16: 15*127*2*8 = 30480 */
        VI mask = VI_SET8(15), ones = VI_SET16(1);
        VI sum[MAX_ROWS][PV];
        UNROLL
        for (int r = 0; r < 4; r++) UNROLL
        for (int half = 0; half < 2; half++) {
            VI w[PV];
            UNROLL
            for (int v = 0; v < PV; v++) {
                w[v] = VI_LOAD(codes + 64 * r + 32 * v);
                w[v] = VI_AND(half ? VI_SRL16(w[v], 4) : w[v], mask);
            }
            UNROLL
            for (int m = 0; m < MR; m++) {
                VI quad = VI_SET32(load32(a + 4 * (MR * (2 * r + half) + m)));
                UNROLL
                for (int v = 0; v < PV; v++) {
                    VI product = VI_MADDUBS(w[v], quad);
                    sum[m][v] = r + half ? VI_ADD16(sum[m][v], product) : product;
                    VI_PIN(sum[m][v]);
                }
            }
        }
        UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) acc[m][v] = VI_ADD32(acc[m][v], VI_MADD(sum[m][v], ones));
    }
#endif
}

INLINE VF weight_scale(const ktk_matrix *w, const uint8_t *scales, int v) {
    if (w->scales_are_bf16) return VF_BITS(VI_SLL32(VI_BF16(scales + 2 * v * LANES), 16));
    return VF_LOAD(scales + 4 * v * LANES);
}

/* A panel to fetch meanwhile, or NULL: the turn-th of every `turns` steps of 32 k, so that a
 * panel's tiles share it. */
typedef struct {
    const uint8_t *ahead;
    int turn, turns;
} fetching;

/* One panel, one tile. Sums over coarse groups wait in out. */
INLINE void tile_integer(const int MR, const int FORMAT, const int KIND, const ktk_matrix *w,
                         const uint8_t *panel, fetching fetch, const tile_rows *rows,
                         float *restrict out, int64_t out_stride) {
    const int bytes_32k = FORMAT == KTK_INT8 ? 512 : 256, unit = FORMAT == KTK_INT8 ? INT8_UNIT : 4;
    const int num_k = w->padded_in, scale_bytes = KTK_PANEL * (w->scales_are_bf16 ? 2 : 4);
    const int fine = KIND == ACTIVATION_FINE ? w->activation_group : w->group_size;
    const int coarse = KIND == ACTIVATION_FINE ? w->group_size : w->activation_group;
    const uint8_t *a = rows->codes, *codes = panel + w->code_offset, *scales = panel;
    const float *a_scale = rows->scales;
    const int32_t *correction = rows->correction;
    int until = fetch.turn;
    VF y[MAX_ROWS][PV]; /* fixed sizes: GCC keeps variable ones in memory */
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++) y[m][v] = VF_ZERO();
    for (int c = 0; c < num_k; c += coarse) {
        const int c_end = c + coarse < num_k ? c + coarse : num_k;
        VF inner[MAX_ROWS][PV];
        UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) inner[m][v] = VF_ZERO();
        for (int f = c; KIND == EQUAL ? f == c : f < c_end; f += fine) {
            const int f_end = f + fine < c_end ? f + fine : c_end;
            VI acc[MAX_ROWS][PV];
            for (int m = 0; m < MR * CHAINS(MR); m++)
                for (int v = 0; v < PV; v++)
                    acc[m][v] = m < MR ? VI_SET32(correction[m]) : VI_ZERO();
            correction += MR;
            for (int k = f; k < f_end; k += 32, codes += bytes_32k, a += 8 * unit * MR) {
                if (MR > STREAMED_ROWS(FORMAT) && fetch.ahead && until-- == 0) {
                    until = fetch.turns - 1;
                    prefetch(fetch.ahead + (codes - panel), bytes_32k);
                }
                dot32(MR, FORMAT, codes, a, acc);
            }
            for (int m = MR; m < MR * CHAINS(MR); m++)
                for (int v = 0; v < PV; v++) acc[m % MR][v] = VI_ADD32(acc[m % MR][v], acc[m][v]);
            UNROLL
            for (int v = 0; v < PV; v++) {
                VF scale = VF_ZERO();
                if (KIND != ACTIVATION_FINE) scale = weight_scale(w, scales, v);
                UNROLL
                for (int m = 0; m < MR; m++) {
                    if (KIND == ACTIVATION_FINE) scale = VF_SET(a_scale[m]);
                    inner[m][v] = VF_FMA(VF_CVT(acc[m][v]), scale, inner[m][v]);
                }
            }
            if (KIND == ACTIVATION_FINE)
                a_scale += MR;
            else
                scales += scale_bytes;
        }
        UNROLL
        for (int v = 0; v < PV; v++) {
            VF scale = VF_ZERO();
            if (KIND == ACTIVATION_FINE) scale = weight_scale(w, scales, v);
            UNROLL
            for (int m = 0; m < MR; m++) {
                float *at = out + m * out_stride + v * LANES;
                if (KIND != ACTIVATION_FINE) scale = VF_SET(a_scale[m]);
                if (KIND == EQUAL) {
                    y[m][v] = VF_FMA(inner[m][v], scale, y[m][v]);
                } else {
                    VF_STORE(at, VF_FMA(inner[m][v], scale, c ? VF_LOAD(at) : VF_ZERO()));
                }
            }
        }
        if (KIND == ACTIVATION_FINE)
            scales += scale_bytes;
        else
            a_scale += MR;
    }
    if (KIND == EQUAL) {
        UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) VF_STORE(out + m * out_stride + v * LANES, y[m][v]);
    }
}

/* Rows index[0 .. num_rows) side by side, at work; returns the end of what it wrote. */
INLINE uint8_t *pack_tile(const int UNIT, const ktk_matrix *w, const ktk_rows *a,
                          const int32_t *index, int num_rows, uint8_t *work, tile_rows *tile) {
    int num_units = w->padded_in / 4, scales = (int)a->scale_stride,
        sums = (int)a->correction_stride;
    if (num_rows == 1) { /* as it lies */
        *tile = (tile_rows){a->codes + index[0] * a->code_stride,
                            a->scales + index[0] * a->scale_stride,
                            a->correction + index[0] * a->correction_stride};
        return work;
    }
    uint8_t *scales_at = work + (int64_t)num_units * num_rows * UNIT;
    uint8_t *correction_at = scales_at + 4 * (int64_t)scales * num_rows;
    *tile = (tile_rows){work, (float *)scales_at, (int32_t *)correction_at};
    if (UNIT == 4)
        interleave(a->codes, a->code_stride, index, num_rows, num_units, work);
    else
        for (int m = 0; m < num_rows; m++)
            for (int k = 0; k < num_units; k++)
                memcpy(work + UNIT * ((int64_t)k * num_rows + m),
                       a->codes + index[m] * a->code_stride + UNIT * k, UNIT);
    interleave((const uint8_t *)a->scales, 4 * a->scale_stride, index, num_rows, scales, scales_at);
    interleave((const uint8_t *)a->correction, 4 * a->correction_stride, index, num_rows, sums,
               correction_at);
    return correction_at + 4 * (int64_t)sums * num_rows;
}

INLINE void tile_of(const int FORMAT, const int KIND, int num_rows, const ktk_matrix *w,
                    const uint8_t *panel, fetching fetch, const tile_rows *rows, float *out,
                    int64_t out_stride) {
    switch (num_rows) {
#define TILE(MR)                                                                                   \
    case MR:                                                                                       \
        tile_integer(MR, FORMAT, KIND, w, panel, fetch, rows, out, out_stride);                    \
        break;
        TILE(1)
        TILE(2)
        TILE(3)
        TILE(4)
        TILE(5)
        TILE(6)
#if MAX_ROWS > 6
        TILE(7)
        TILE(8)
#endif
#undef TILE
    }
}

INLINE void gemm_integer(const int FORMAT, const int KIND, const ktk_matrix *w,
                         const uint8_t *panels, int num_panels, const ktk_rows *a,
                         const int32_t *rows, int num_rows, float *out, int64_t out_stride,
                         const uint8_t *next, uint8_t *work) {
    const int num_tiles =
        /* of nearly equal height */
        num_rows <= MAX_ROWS ? 1 : (num_rows + BEST_ROWS - 1) / BEST_ROWS;
    tile_rows tile[(CALL_ROWS + BEST_ROWS - 1) / BEST_ROWS];
    for (int t = 0; t < num_tiles; t++) {
        int first = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
        work = pack_tile(FORMAT == KTK_INT8 ? INT8_UNIT : 4, w, a, rows + first, end - first, work,
                         &tile[t]);
    }
    for (int p = 0; p < num_panels; p++) {
        const uint8_t *panel = panels + p * w->panel_bytes;
        const uint8_t *ahead = p + 1 < num_panels ? panel + w->panel_bytes : next;
        /* All scales at once, so that memory is read in one stream: they lie before the codes. */
        for (int i = 0; i < w->code_offset; i += 64)
            _mm_prefetch((const char *)panel + i, _MM_HINT_T0);
        for (int t = 0; t < num_tiles; t++) {
            int first = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
            tile_of(FORMAT, KIND, end - first, w, panel, (fetching){ahead, t, num_tiles}, &tile[t],
                    out + first * out_stride + p * KTK_PANEL, out_stride);
        }
    }
}

/* Ten arguments, not their struct: read out of one GCC 12 keeps fewer of them in registers and
 * spills up to twelve vectors more for 32 k of int4_equal. */
#define GEMM_INTEGER(NAME, FORMAT, KIND)                                                           \
    static __attribute__((noipa)) void NAME(                                                       \
        const ktk_matrix *w, const uint8_t *panels, int num_panels, const ktk_rows *a,             \
        const int32_t *rows, int num_rows, float *out, int64_t out_stride, const uint8_t *next,    \
        uint8_t *work) {                                                                           \
        gemm_integer(FORMAT, KIND, w, panels, num_panels, a, rows, num_rows, out, out_stride,      \
                     next, work);                                                                  \
    }
#define SPREAD(g)                                                                                  \
    (g)->w, (g)->panels, (g)->num_panels, (g)->a, (g)->rows, (g)->num_rows, (g)->out,              \
        (g)->out_stride, (g)->next, (g)->work

GEMM_INTEGER(int4_weight_fine, KTK_INT4, WEIGHT_FINE)
GEMM_INTEGER(int4_activation_fine, KTK_INT4, ACTIVATION_FINE)
GEMM_INTEGER(int4_equal, KTK_INT4, EQUAL)
GEMM_INTEGER(int8_weight_fine, KTK_INT8, WEIGHT_FINE)
GEMM_INTEGER(int8_activation_fine, KTK_INT8, ACTIVATION_FINE)

void CAT(ktk_gemm_int4_, KTK_ISA)(const ktk_gemm_args *g) {
    const ktk_matrix *w = g->w;
    if (w->group_size == w->activation_group)
        int4_equal(SPREAD(g));
    else if (w->group_size < w->activation_group)
        int4_weight_fine(SPREAD(g));
    else
        int4_activation_fine(SPREAD(g));
}

void CAT(ktk_gemm_int8_, KTK_ISA)(const ktk_gemm_args *g) {
    if (g->w->group_size <= g->w->activation_group)
        int8_weight_fine(SPREAD(g));
    else
        int8_activation_fine(SPREAD(g));
}

/* y = fma(a[k], w[k], y) for k in order. */
INLINE void tile_float(const int MR, const int NP, const int FORMAT, const ktk_matrix *w,
                       const uint8_t *panel, const ktk_rows *rows, const int32_t *index, float *out,
                       int64_t out_stride) {
    const float *a[8];
    UNROLL
    for (int m = 0; m < MR; m++) a[m] = (const float *)(rows->codes + index[m] * rows->code_stride);
    VF y[4][8][PV]; /* fixed sizes: GCC keeps variable ones in memory */
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
    for (int v = 0; v < PV; v++)
        VF_STORE(out + m * out_stride + p * KTK_PANEL + v * LANES, y[p][m][v]);
}

/* Four panels at a time where few rows leave registers and latency to fill, then one by one. */
#define ROWS_OF(MR, NP, FORMAT)                                                                    \
    for (; i + MR <= num_rows; i += MR)                                                            \
        tile_float(MR, NP, FORMAT, w, panel, a, rows + i, out + i * out_stride + p * KTK_PANEL,    \
                   out_stride);

#ifdef __AVX512F__
#define ALL_ROWS(NP, FORMAT)                                                                       \
    if (NP == 1) {                                                                                 \
        ROWS_OF(8, 1, FORMAT)                                                                      \
    }                                                                                              \
    if (NP <= 2) {                                                                                 \
        ROWS_OF(4, NP, FORMAT)                                                                     \
    }                                                                                              \
    ROWS_OF(2, NP, FORMAT)                                                                         \
    ROWS_OF(1, NP, FORMAT)
#else
#define ALL_ROWS(NP, FORMAT)                                                                       \
    if (NP == 1) {                                                                                 \
        ROWS_OF(4, 1, FORMAT)                                                                      \
    }                                                                                              \
    ROWS_OF(2, NP, FORMAT)                                                                         \
    ROWS_OF(1, NP, FORMAT)
#endif

#define GEMM_FLOAT(NAME, FORMAT)                                                                   \
    void NAME(const ktk_gemm_args *g) {                                                            \
        const ktk_matrix *w = g->w;                                                                \
        const uint8_t *const panels = g->panels;                                                   \
        const ktk_rows *a = g->a;                                                                  \
        const int32_t *rows = g->rows;                                                             \
        const int num_panels = g->num_panels, num_rows = g->num_rows;                              \
        float *out = g->out;                                                                       \
        const int64_t out_stride = g->out_stride;                                                  \
        int p = 0;                                                                                 \
        if (num_rows <= 3)                                                                         \
            for (; p + 4 / PV <= num_panels; p += 4 / PV) {                                        \
                const uint8_t *panel = panels + p * w->panel_bytes;                                \
                int i = 0;                                                                         \
                ALL_ROWS(4 / PV, FORMAT)                                                           \
            }                                                                                      \
        for (; p < num_panels; p++) {                                                              \
            const uint8_t *panel = panels + p * w->panel_bytes;                                    \
            int i = 0;                                                                             \
            ALL_ROWS(1, FORMAT)                                                                    \
        }                                                                                          \
    }

GEMM_FLOAT(CAT(ktk_gemm_bf16_, KTK_ISA), KTK_BF16)
GEMM_FLOAT(CAT(ktk_gemm_fp32_, KTK_ISA), KTK_FP32)

#include "gemm_levels.h"

#ifdef __AVX512VNNI__
enum { INT8_CODES = KTK_CODES_I8 };
#else
enum { INT8_CODES = KTK_CODES_I16 };
#endif

#define GEMM(NAME, CODES) {CAT(ktk_gemm_##NAME##_, KTK_ISA), KTK_TEXT(KTK_ISA), CODES, BLOCK_SIZES}
#define LEVELS(NAME)                                                                               \
    {CAT(ktk_gemm_##NAME##_, KTK_ISA), KTK_TEXT(KTK_ISA), KTK_CODES_I8, CALL_ROWS, CALL_ROWS, 0,   \
     {4096 + CHUNK_BYTES, 64, 128}}
const ktk_kernels CAT(ktk_panels_, KTK_ISA) = {
    .name = KTK_TEXT(KTK_ISA),
    .gemm = {[KTK_NL2] = LEVELS(nl2),
             [KTK_NL3] = LEVELS(nl3),
             [KTK_NL4] = LEVELS(nl4),
             [KTK_INT4] = GEMM(int4, KTK_CODES_I8),
             [KTK_INT8] = GEMM(int8, INT8_CODES),
             [KTK_BF16] = GEMM(bf16, KTK_CODES_F32),
             [KTK_FP32] = GEMM(fp32, KTK_CODES_F32)},
    .tasks = {.up_panels = 16, .down_panels = 64, .least_down_panels = 4},
    .quantise = CAT(ktk_quantise_, KTK_ISA),
    .rotate = CAT(ktk_rotate_, KTK_ISA),
    .activate = CAT(ktk_activate_, KTK_ISA),
    .load = CAT(ktk_load_, KTK_ISA),
    .store = CAT(ktk_store_, KTK_ISA),
    .combine = CAT(ktk_combine_, KTK_ISA),
    .add = CAT(ktk_add_, KTK_ISA),
    .attend = CAT(ktk_attend_, KTK_ISA),
    .pack_panel = CAT(ktk_pack_panel_, KTK_ISA),
};
