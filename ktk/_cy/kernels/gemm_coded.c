/* y[row][channel] of codes that checkpoints have, as they are (coded.h); compiled for AVX2 and
 * AVX-512, which VNNI's level takes, too.
 *
 * fp8: activations fp32. inner = fma(a[k], value of the code, inner) for k of a group in order,
 * from +0; y = fma(inner, scale, y).
 *
 * 4 bits: activations are integers within +-KTK_PLANES_MOST, a scale for 32 k. acc = sum of integer
 * products over the smaller of 32 k and the weights' group, exact; inner = fma(acc, weights' scale,
 * inner) over 32 k; y = fma(inner, activations' scale, y) (ktk/reference/linear.py). Of exact sums
 * the order does not count, so few rows take bytes and many fp32: products of a group stay below
 * 2^24.
 *
 * Few rows multiply what has just been decoded, in registers. Of 4 bits an activation is 171 * high
 * + low, bytes within +-85, and a weight is 0 to 24: VPMADDUBSW of each plane, 32 k of which fit 16
 * bits (16 * 85 * 24 = 32640), then VPMADDWD by 171 and by 1. AVX2, 32 k of 8 channels: 4 loads,
 * 4 shifts, 8 masks, 8 lookups, 16 products, 14 sums, 2 + 2 to widen and 7 for scales.
 * Of more rows CHUNK_K k of a panel are decoded once, to L1, and every tile of rows goes over them.
 *
 * Symbols: ktk_gemm_mxfp4_avx2 ktk_gemm_mxfp4_avx512 ktk_gemm_nvfp4_avx2 ktk_gemm_nvfp4_avx512
 *   ktk_gemm_int4_asym_avx2 ktk_gemm_int4_asym_avx512 ktk_gemm_fp8_avx2 ktk_gemm_fp8_avx512
 *   ktk_gemm_fp8_channel_avx2 ktk_gemm_fp8_channel_avx512 ktk_gemm_fp8_e5m2_avx2
 *   ktk_gemm_fp8_e5m2_avx512 ktk_gemm_mxfp8_avx2 ktk_gemm_mxfp8_avx512. */
#include "coded.h"
#include "ktk_kernels.h"
#include "vec.h"

enum {
    CHUNK_K = 128, /* 8 KiB of values */
    BLOCK = 32,    /* k of an activation's scale */
    LEAST_GROUP = 16,
    CHUNK_SCALES = CHUNK_K / LEAST_GROUP,
    CODED_WORK = 4 * KTK_PANEL * (CHUNK_K + CHUNK_SCALES),
    DIRECT_ROWS = 4, /* of 4 bits */
    CALL_ROWS = 64
};

/* Bytes that few rows fetch ahead of each panel's codes: both cores read 28 to 35 GB/s then, 18 to
 * 25 without. */
enum { AHEAD = 2048 };

/* What lies AHEAD of codes at `offset` of a panel's: behind their end those of the panel that comes
 * NP later. */
INLINE void fetch_codes(const int NP, const ktk_matrix *w, const uint8_t *codes, int64_t offset) {
    if (offset + AHEAD >= w->panel_bytes - w->code_offset)
        offset += (NP - 1) * w->panel_bytes + w->code_offset;
    _mm_prefetch((const char *)codes + offset + AHEAD, _MM_HINT_T0);
}

/* Scales of the NP panels behind these. */
INLINE void fetch_scales(const int NP, const ktk_matrix *w, const uint8_t *panel) {
    for (int p = NP; p < 2 * NP; p++)
        for (int64_t i = 0; i < w->code_offset; i += 64)
            _mm_prefetch((const char *)panel + p * w->panel_bytes + i, _MM_HINT_T0);
}

INLINE const ktk_planes *planes_of(const ktk_rows *rows, int row) {
    return (const ktk_planes *)(rows->codes + row * rows->code_stride);
}

/* What a group's sums of this format are to be multiplied by before its scale. */
INLINE float up_of(const int FORMAT) {
    if (HAS_4_BITS(FORMAT)) return FORMAT == KTK_NVFP4 ? 1 / SCALE_DOWN : 1.0f;
    return 1 / KTK_ROWS_HIGH / fp8_down(FORMAT);
}

/* Group g of NP panels is over: y = fma(inner, scale, y), y in out. */
INLINE void add_group(const int MR, const int NP, const int FORMAT, const ktk_matrix *w,
                      const uint8_t *panel, int g, VF inner[4][4][PV], float *out,
                      int64_t out_stride) {
    UNROLL
    for (int p = 0; p < NP; p++) {
        VF scale[PV];
        coded_scales(FORMAT, panel + p * w->panel_bytes, g, scale);
        UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) {
            float *at = out + m * out_stride + p * KTK_PANEL + v * LANES;
            const VF sum = VF_MUL(inner[p][m][v], VF_SET(up_of(FORMAT)));
            VF_STORE(at, VF_FMA(sum, scale[v], g ? VF_LOAD(at) : VF_ZERO()));
        }
    }
}

INLINE void tile_fp8(const int MR, const int NP, const int FORMAT, const ktk_matrix *w,
                     const uint8_t *panel, const ktk_rows *rows, const int32_t *index, float *out,
                     int64_t out_stride) {
    const float *a[4];
    UNROLL
    for (int m = 0; m < MR; m++) a[m] = (const float *)(rows->codes + index[m] * rows->code_stride);
    fetch_scales(NP, w, panel);
    for (int g = 0, k = 0; k < w->padded_in; g++) {
        const int end = k + w->group_size < w->padded_in ? k + w->group_size : w->padded_in;
        VF inner[4][4][PV]; /* fixed sizes: GCC keeps variable ones in memory */
        UNROLL
        for (int p = 0; p < NP; p++) UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) inner[p][m][v] = VF_ZERO();
        for (; k < end; k += 4) UNROLL
        for (int p = 0; p < NP; p++) UNROLL
        for (int v = 0; v < PV; v++) {
            const uint8_t *codes = panel + p * w->panel_bytes + w->code_offset;
            if (!v) fetch_codes(NP, w, codes, (int64_t)k * KTK_PANEL);
            VF weights[4];
            fp8_four(FORMAT, codes + (int64_t)k * KTK_PANEL + v * 4 * LANES, weights);
            UNROLL
            for (int i = 0; i < 4; i++) UNROLL
            for (int m = 0; m < MR; m++)
                inner[p][m][v] = VF_FMA(VF_SET(a[m][k + i]), weights[i], inner[p][m][v]);
        }
        add_group(MR, NP, FORMAT, w, panel, g, inner, out, out_stride);
    }
}

/* Twice e2m1's values and KTK_E2M1_ZERO. */
static const uint8_t ktk_e2m1_bytes[16]
    __attribute__((aligned(16))) = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

INLINE VI quad_of(const int8_t *codes) { /* as floats: VPBROADCASTD would take a vector port */
    float four;
    memcpy(&four, codes, 4);
    return VI_BITS(VF_SET(four));
}

/* NP panels side by side: more streams of memory, and broadcasts that serve them all. */
INLINE void tile_planes(const int MR, const int NP, const int FORMAT, const ktk_matrix *w,
                        const uint8_t *panel, const ktk_rows *rows, const int32_t *index,
                        float *out, int64_t out_stride) {
    const int IS_E2M1 = FORMAT != KTK_INT4_ASYM, GROUP = FORMAT == KTK_NVFP4 ? 16 : BLOCK;
    const VI nibble = VI_SET8(15), table = VI_LOAD_TABLE(ktk_e2m1_bytes);
    const VI base = VI_SET16(KTK_PLANE_BASE), one = VI_SET16(1);
    const ktk_planes *a[2];
    const float *a_scale[2];
    const int32_t *correction[2];
    float by[2]; /* gate's and up's panels alternate, and a tensor scale is a projection's */
    VF y[2][2][PV], scale[2][PV], zero[2][PV]; /* fixed sizes: GCC keeps variable ones in memory */
    UNROLL
    for (int m = 0; m < MR; m++) {
        a[m] = planes_of(rows, index[m]);
        a_scale[m] = rows->scales + index[m] * rows->scale_stride;
        correction[m] = rows->correction + index[m] * rows->correction_stride;
    }
    UNROLL
    for (int p = 0; p < NP; p++)
        by[p] = tensor_scale(FORMAT, w, panel + p * w->panel_bytes) * (IS_E2M1 ? 0.5f : 1.0f);
    UNROLL
    for (int p = 0; p < NP; p++) UNROLL
    for (int v = 0; v < PV; v++) {
        UNROLL
        for (int m = 0; m < MR; m++) y[p][m][v] = VF_ZERO();
        scale[p][v] = zero[p][v] = VF_ZERO();
    }
    fetch_scales(NP, w, panel);
    for (int k = 0; k < w->padded_in; k += BLOCK) {
        const int64_t offset = (int64_t)k * KTK_PANEL / 2;
        const uint8_t *codes = panel + w->code_offset + offset;
        VF inner[2][2][PV];
        UNROLL
        for (int from = 0; from < BLOCK; from += GROUP) {
            VI high[2][2][PV], low[2][2][PV];
            UNROLL
            for (int quad = from / 4; quad < (from + GROUP) / 4; quad++) UNROLL
            for (int p = 0; p < NP; p++) UNROLL
            for (int v = 0; v < PV; v++) {
                if (!v && quad % 2 == 0)
                    fetch_codes(NP, w, panel + p * w->panel_bytes + w->code_offset,
                                offset + quad * 32);
                VI code = VI_LOAD(codes + p * w->panel_bytes + quad / 2 * 64 + v * 32);
                code = VI_AND(quad % 2 ? VI_SRL16(code, 4) : code, nibble);
                if (IS_E2M1) code = VI_SHUFFLE8(table, code);
                UNROLL
                for (int m = 0; m < MR; m++) {
                    const VI h = VI_MADDUBS(code, quad_of(a[m]->planes[quad][0]));
                    const VI l = VI_MADDUBS(code, quad_of(a[m]->planes[quad][1]));
                    high[p][m][v] = quad == from / 4 ? h : VI_ADD16(high[p][m][v], h);
                    low[p][m][v] = quad == from / 4 ? l : VI_ADD16(low[p][m][v], l);
                    VI_PIN(high[p][m][v]);
                    VI_PIN(low[p][m][v]);
                }
            }
            const int size = IS_E2M1 ? GROUP : w->group_size, group = (k + from) / size;
            const int begins = group * size == k + from;
            UNROLL
            for (int p = 0; p < NP; p++) {
                const uint8_t *at = panel + p * w->panel_bytes;
                if (IS_E2M1 || begins) coded_scales(FORMAT, at, group, scale[p]);
                if (!IS_E2M1 && begins) zero_points(w, at, group, zero[p]);
                UNROLL
                for (int m = 0; m < MR; m++) {
                    const VI less = VI_SET32(*correction[m]);
                    UNROLL
                    for (int v = 0; v < PV; v++) {
                        const VI sum =
                            VI_ADD32(VI_MADD(high[p][m][v], base), VI_MADD(low[p][m][v], one));
                        const VF acc = IS_E2M1 ? VF_CVT(VI_ADD32(sum, less))
                                               : VF_FMA(zero[p][v], VF_CVT(less), VF_CVT(sum));
                        const VF before = from ? inner[p][m][v] : VF_ZERO();
                        inner[p][m][v] = VF_FMA(acc, scale[p][v], before);
                    }
                }
            }
            UNROLL
            for (int m = 0; m < MR; m++) correction[m]++;
        }
        UNROLL
        for (int m = 0; m < MR; m++) {
            const float a_own = *a_scale[m]++;
            a[m]++;
            UNROLL
            for (int p = 0; p < NP; p++) {
                const VF own = VF_SET(a_own * by[p]);
                UNROLL
                for (int v = 0; v < PV; v++) {
                    VF sum = inner[p][m][v];
                    if (FORMAT == KTK_NVFP4) sum = VF_MUL(sum, VF_SET(up_of(FORMAT)));
                    y[p][m][v] = VF_FMA(sum, own, y[p][m][v]);
                }
            }
        }
    }
    UNROLL
    for (int p = 0; p < NP; p++) UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++)
        VF_STORE(out + m * out_stride + p * KTK_PANEL + v * LANES, y[p][m][v]);
}

/* k [first, first + num_k) of a panel as values [num_k][16], and its groups'
 * scales [16]: of whole groups, or within the only one. */
typedef struct {
    const float *values, *scales;
    int first, num_k;
} decoded_chunk;

INLINE void tile_decoded(const int MR, const ktk_matrix *w, const decoded_chunk *c,
                         const ktk_rows *rows, const int32_t *index, float up, float *out,
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
                if (is_whole || ends)
                    inner[m][v] = VF_FMA(VF_MUL(inner[m][v], VF_SET(up)), scale, before);
                VF_STORE(at, inner[m][v]);
            }
        }
    }
}

/* The same of 4 bits, `group` k of which share a scale: no more than an activation's. */
INLINE void tile_integers(const int MR, const int group, const decoded_chunk *c,
                          const ktk_rows *rows, const int32_t *index, float up, float by,
                          float *out, int64_t out_stride) {
    const ktk_planes *a[8];
    const float *a_scale[8];
    UNROLL
    for (int m = 0; m < MR; m++) {
        a[m] = planes_of(rows, index[m]) + c->first / BLOCK;
        a_scale[m] = rows->scales + index[m] * rows->scale_stride + c->first / BLOCK;
    }
    const float *values = c->values, *scales = c->scales;
    for (int block = 0; block < c->num_k / BLOCK; block++) {
        VF inner[8][PV]; /* fixed sizes: GCC keeps variable ones in memory */
        UNROLL
        for (int m = 0; m < MR; m++) UNROLL
        for (int v = 0; v < PV; v++) inner[m][v] = VF_ZERO();
        for (int k = 0; k < BLOCK; scales += KTK_PANEL) {
            VF acc[8][PV];
            UNROLL
            for (int m = 0; m < MR; m++) UNROLL
            for (int v = 0; v < PV; v++) acc[m][v] = VF_ZERO();
            for (const int end = k + group; k < end; k++, values += KTK_PANEL) UNROLL
            for (int m = 0; m < MR; m++) {
                const VF x = VF_SET(a[m][block].codes[k]);
                UNROLL
                for (int v = 0; v < PV; v++)
                    acc[m][v] = VF_FMA(x, VF_LOAD(values + v * LANES), acc[m][v]);
            }
            UNROLL
            for (int v = 0; v < PV; v++) UNROLL
            for (int m = 0; m < MR; m++)
                inner[m][v] = VF_FMA(acc[m][v], VF_LOAD(scales + v * LANES), inner[m][v]);
        }
        UNROLL
        for (int m = 0; m < MR; m++) {
            const VF scale = VF_SET(a_scale[m][block] * by);
            UNROLL
            for (int v = 0; v < PV; v++) {
                float *at = out + m * out_stride + v * LANES;
                const VF before = c->first + block ? VF_LOAD(at) : VF_ZERO();
                VF_STORE(at, VF_FMA(VF_MUL(inner[m][v], VF_SET(up)), scale, before));
            }
        }
    }
}

INLINE void panel_by_chunks(const int FORMAT, const ktk_gemm_args *g, const uint8_t *panel,
                            float *out) {
    const ktk_matrix *w = g->w;
    const int group = HAS_4_BITS(FORMAT) && w->group_size > BLOCK ? BLOCK : w->group_size;
    const float up = up_of(FORMAT), by = tensor_scale(FORMAT, w, panel);
    float *const values = (float *)g->work, *const scales = values + CHUNK_K * KTK_PANEL;
    for (int first = 0; first < w->padded_in; first += CHUNK_K) {
        const int num_k = w->padded_in - first < CHUNK_K ? w->padded_in - first : CHUNK_K;
        const decoded_chunk c = {values, scales, first, num_k};
        coded_values(FORMAT, w, panel, first, num_k, values);
        for (int k = 0, i = 0; k < num_k; k += group, i++) {
            VF scale[PV];
            coded_scales(FORMAT, panel, (first + k) / w->group_size, scale);
            UNROLL
            for (int v = 0; v < PV; v++) VF_STORE(scales + i * KTK_PANEL + v * LANES, scale[v]);
        }
        int i = 0;
#define CHUNK_ROWS(MR)                                                                             \
    for (; i + MR <= g->num_rows; i += MR) {                                                       \
        float *at = out + i * g->out_stride;                                                       \
        if (HAS_4_BITS(FORMAT))                                                                    \
            tile_integers(MR, group, &c, g->a, g->rows + i, up, by, at, g->out_stride);            \
        else                                                                                       \
            tile_decoded(MR, w, &c, g->a, g->rows + i, up, at, g->out_stride);                     \
    }
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
    if (g->num_rows > (HAS_4_BITS(FORMAT) ? DIRECT_ROWS : 2)) {
        for (; p < g->num_panels; p++)
            panel_by_chunks(FORMAT, g, g->panels + p * panel_bytes, g->out + p * KTK_PANEL);
        return;
    }
#define DIRECT(TILE, MR, NP)                                                                       \
    for (; p + (NP) <= g->num_panels; p += NP)                                                     \
        TILE(MR, NP, FORMAT, g->w, g->panels + p * panel_bytes, g->a, g->rows,                     \
             g->out + p * KTK_PANEL, g->out_stride);
    if (HAS_4_BITS(FORMAT)) {
        if (g->num_rows == 1) {
            DIRECT(tile_planes, 1, 2)
            DIRECT(tile_planes, 1, 1)
        }
        for (; p < g->num_panels; p++) /* the last two of three rows are two again */
            for (int i = 0; i < g->num_rows; i += 2) {
                const int first = i + 2 <= g->num_rows ? i : g->num_rows - 2;
                tile_planes(2, 1, FORMAT, g->w, g->panels + p * panel_bytes, g->a, g->rows + first,
                            g->out + first * g->out_stride + p * KTK_PANEL, g->out_stride);
            }
    } else if (g->num_rows == 1) {
        DIRECT(tile_fp8, 1, 4)
        DIRECT(tile_fp8, 1, 1)
    } else {
        DIRECT(tile_fp8, 2, 2)
        DIRECT(tile_fp8, 2, 1)
    }
#undef DIRECT
}

#define GEMM_CODED(ENUM, NAME)                                                                     \
    void CAT(ktk_gemm_##NAME##_, KTK_ISA)(const ktk_gemm_args *g) { gemm_coded(KTK_##ENUM, g); }
KTK_CODED_FORMATS(GEMM_CODED)

#define CODED(ENUM, NAME)                                                                          \
    [KTK_##ENUM] = {CAT(ktk_gemm_##NAME##_, KTK_ISA),                                              \
                    KTK_TEXT(KTK_ISA),                                                             \
                    HAS_4_BITS(KTK_##ENUM) ? KTK_CODES_PLANES : KTK_CODES_F32_HIGH,                \
                    CALL_ROWS,                                                                     \
                    CALL_ROWS,                                                                     \
                    0,                                                                             \
                    {CODED_WORK, 0, 0}},
const ktk_kernels CAT(ktk_coded_, KTK_ISA) = {
    .name = KTK_TEXT(KTK_ISA),
    .gemm = {KTK_CODED_FORMATS(CODED)},
};
