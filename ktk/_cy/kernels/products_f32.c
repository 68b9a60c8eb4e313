/* Products of fp32 rows, and weights as fp32: what training is made of (train.c); compiled once per
 * ISA row.
 *
 * product_nt: c[m][j] = sum over k of a[m][k] * b[j][k]. A vector of sums for each of ROWS x 4
 * outputs runs along k and is added up across at the end: lanes, then halves. A panel is 16 k of
 * every j, which lie as the caller says: decoded panels and rows alike. 256 bit: 3 x 4 sums, 3 of a
 * and 1 of b fill 16 registers, 7 loads for 12 FMAs; 512 bit: 6 x 4, 10 loads for 24.
 *
 * product_nn: c[m][j] = sum over k of a[k, m] * b[k][j]: vectors along j, a broadcast from
 * anywhere. 6 rows x 2 vectors of sums (512 bit: 12 x 2).
 *
 * Sums of an output do not depend on the others. decode: panels of ktk/experts/layout.py to fp32
 * [k][16]; code times scale is rounded once.
 *
 * Symbols: ktk_product_nt_avx2 ktk_product_nt_avx512 ktk_product_nt_avx512vnni ktk_product_nn_avx2
 *   ktk_product_nn_avx512 ktk_product_nn_avx512vnni. */
#include <string.h>

#include "coded.h"
#include "ktk_kernels.h"
#include "level_codes.h"
#include "row.h"
#include "vec.h"

#ifdef __AVX512F__
enum { NT_ROWS = 6, NN_ROWS = 12 };
#else
enum { NT_ROWS = 3, NN_ROWS = 6 };
#endif
enum { NT_COLUMNS = 4, NN_VECTORS = 2, NT_BYTES = 16 << 10 };

/* The sums of the lanes of four vectors. */
INLINE __m128 sum_lanes(const VF v[4]) {
#ifdef __AVX512F__
    __m256 w[4];
    UNROLL
    for (int i = 0; i < 4; i++)
        w[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
#else
    const __m256 *w = v;
#endif
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* Columns j of MR rows; C of them count. */
INLINE void tile_nt(const int MR, const ktk_product_nt *p, const float *const a[NT_ROWS],
                    const float *b, int columns, float *const c[NT_ROWS]) {
    VF sum[NT_ROWS][NT_COLUMNS];
    const float *column[NT_COLUMNS];
    UNROLL
    for (int j = 0; j < NT_COLUMNS; j++) column[j] = b + (j < columns ? j : 0) * p->b_column;
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int j = 0; j < NT_COLUMNS; j++) sum[m][j] = VF_ZERO();
    for (int64_t panel = 0, at = 0; panel < p->num_panels; panel++, at += p->b_panel) UNROLL
    for (int v = 0; v < 16; v += LANES) {
        VF x[NT_ROWS];
        UNROLL
        for (int m = 0; m < MR; m++) x[m] = VF_LOAD(a[m] + 16 * panel + v);
        UNROLL
        for (int j = 0; j < NT_COLUMNS; j++) {
            const VF w = VF_LOAD(column[j] + at + v);
            UNROLL
            for (int m = 0; m < MR; m++) sum[m][j] = VF_FMA(x[m], w, sum[m][j]);
        }
    }
    UNROLL
    for (int m = 0; m < MR; m++) {
        const __m128 four = sum_lanes(sum[m]);
        if (columns == NT_COLUMNS) {
            _mm_storeu_ps(c[m], p->is_added ? _mm_add_ps(_mm_loadu_ps(c[m]), four) : four);
            continue;
        }
        float each[NT_COLUMNS];
        _mm_storeu_ps(each, four);
        for (int j = 0; j < columns; j++) c[m][j] = p->is_added ? c[m][j] + each[j] : each[j];
    }
}

/* Rows [first, end), few enough to stay in first-level cache, over all columns. */
INLINE void rows_nt(const ktk_product_nt *p, int first, int end) {
    for (int j = 0; j < p->num_columns; j += NT_COLUMNS) {
        const int columns = p->num_columns - j < NT_COLUMNS ? p->num_columns - j : NT_COLUMNS;
        const float *b = p->b + j * p->b_column;
        for (int i = first; i < end; i += NT_ROWS) {
            const float *a[NT_ROWS];
            float *c[NT_ROWS];
            const int rows = end - i < NT_ROWS ? end - i : NT_ROWS;
            for (int m = 0; m < rows; m++) {
                a[m] = p->a + (p->rows ? p->rows[i + m] : i + m) * p->a_stride;
                c[m] = p->c + (i + m) * p->c_stride + j;
            }
            switch (rows) {
#define ROWS(MR)                                                                                   \
    case MR:                                                                                       \
        tile_nt(MR, p, a, b, columns, c);                                                          \
        break;
                ROWS(1)
                ROWS(2)
                ROWS(3)
#ifdef __AVX512F__
                ROWS(4)
                ROWS(5)
                ROWS(6)
#endif
#undef ROWS
            }
        }
    }
}

void CAT(ktk_product_nt_, KTK_ISA)(const ktk_product_nt *p) {
    int rows = NT_BYTES / 64 / (p->num_panels ? p->num_panels : 1) / NT_ROWS * NT_ROWS;
    if (rows < NT_ROWS) rows = NT_ROWS;
    for (int i = 0; i < p->num_rows; i += rows)
        rows_nt(p, i, p->num_rows - i < rows ? p->num_rows : i + rows);
}

/* MR rows, VECTORS vectors of columns. */
INLINE void tile_nn(const int MR, const int VECTORS, const ktk_product_nn *p, const float *a,
                    const float *b, float *c) {
    VF sum[NN_ROWS][NN_VECTORS];
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < VECTORS; v++)
        sum[m][v] = p->is_added ? VF_LOAD(c + m * p->c_stride + v * LANES) : VF_ZERO();
    for (int k = 0; k < p->num_k; k++, a += p->a_k, b += p->b_stride) {
        VF w[NN_VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++) w[v] = VF_LOAD(b + v * LANES);
        UNROLL
        for (int m = 0; m < MR; m++) {
            const VF x = VF_SET(a[m * p->a_row]);
            UNROLL
            for (int v = 0; v < VECTORS; v++) sum[m][v] = VF_FMA(x, w[v], sum[m][v]);
        }
    }
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < VECTORS; v++) VF_STORE(c + m * p->c_stride + v * LANES, sum[m][v]);
}

INLINE void rows_nn(const int VECTORS, const ktk_product_nn *p, int j) {
    int i = 0;
#define ROWS(MR)                                                                                   \
    for (; i + MR <= p->num_rows; i += MR)                                                         \
        tile_nn(MR, VECTORS, p, p->a + i * p->a_row, p->b + j, p->c + i * p->c_stride + j);
    ROWS(NN_ROWS)
    ROWS(3)
    ROWS(1)
#undef ROWS
}

void CAT(ktk_product_nn_, KTK_ISA)(const ktk_product_nn *p) {
    int j = 0;
    for (; j + NN_VECTORS * LANES <= p->num_columns; j += NN_VECTORS * LANES)
        rows_nn(NN_VECTORS, p, j);
    for (; j < p->num_columns; j += LANES) rows_nn(1, p, j);
}

/* -- panels to fp32 */

/* Scales of a group of channels' LANES. */
INLINE VF scale_of(const ktk_matrix *w, const uint8_t *panel, int group, int v) {
    if (w->scales_are_bf16)
        return VF_BITS(VI_SLL32(VI_BF16(panel + (group * KTK_PANEL + v * LANES) * 2), 16));
    return VF_LOAD(panel + (group * KTK_PANEL + v * LANES) * 4);
}

/* Signed bytes of a vector's dwords, byte i of each, to fp32. */
INLINE VF signed_byte(VI x, int i) { return VF_CVT(VI_SRA32(VI_SLL32(x, 24 - 8 * i), 24)); }

/* CODES(k, scale): what 32 k of one panel become, [k][16]; four k of LANES channels are a vector of
 * codes. A group has 32 k and more. */
#define EACH_32(CODES)                                                                             \
    int group = first / w->group_size, left = w->group_size - first % w->group_size;               \
    VF scale[PV];                                                                                  \
    for (int k = 0; k < num_k; k += 32, left -= 32) {                                              \
        if (!left) group++, left = w->group_size;                                                  \
        UNROLL                                                                                     \
        for (int v = 0; v < PV; v++) scale[v] = scale_of(w, panel, group, v);                      \
        CODES(k, scale)                                                                            \
    }

static void decode_int8(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                        float *out) {
    const VI flip = VI_SET32((int)0x80808080u);
    const uint8_t *codes = panel + w->code_offset + (int64_t)first * KTK_PANEL;
#define CODES(K, SCALE)                                                                            \
    UNROLL                                                                                         \
    for (int q = K; q < K + 32; q += 4, codes += 4 * KTK_PANEL) UNROLL                             \
    for (int v = 0; v < PV; v++) {                                                                 \
        const VI x = VI_XOR(VI_LOAD(codes + v * 4 * LANES), flip);                                 \
        UNROLL                                                                                     \
        for (int i = 0; i < 4; i++)                                                                \
            VF_STORE(out + (q + i) * KTK_PANEL + v * LANES, VF_MUL(signed_byte(x, i), SCALE[v]));  \
    }
    EACH_32(CODES)
#undef CODES
}

/* Bytes of eight k, those of the first four and of the last, to [8][16]. */
INLINE void put_8(VI low, VI high, VF scale, float *at) {
    UNROLL
    for (int i = 0; i < 4; i++) {
        VF_STORE(at + i * KTK_PANEL, VF_MUL(signed_byte(low, i), scale));
        VF_STORE(at + (4 + i) * KTK_PANEL, VF_MUL(signed_byte(high, i), scale));
    }
}

static void decode_int4(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                        float *out) {
    const VI mask = VI_SET8(15), eight = VI_SET8(8);
    const uint8_t *codes = panel + w->code_offset + (int64_t)first * KTK_PANEL / 2;
#define CODES(K, SCALE)                                                                            \
    UNROLL                                                                                         \
    for (int q = K; q < K + 32; q += 8, codes += 4 * KTK_PANEL) UNROLL                             \
    for (int v = 0; v < PV; v++) {                                                                 \
        const VI both = VI_LOAD(codes + v * 4 * LANES);                                            \
        put_8(VI_SUB8(VI_AND(both, mask), eight), VI_SUB8(VI_AND(VI_SRL16(both, 4), mask), eight), \
              SCALE[v], out + q * KTK_PANEL + v * LANES);                                          \
    }
    EACH_32(CODES)
#undef CODES
}

/* The scale of a channel times the multiplier of 16 k. */
INLINE VF level_scale(const int BITS, const ktk_matrix *w, const uint8_t *panel, int k, int v) {
    const VF scale = VF_LOAD(panel + v * LANES * 4);
    if (!w->multiplier_group) return scale;
    const int group = k / w->multiplier_group;
    const uint8_t *both = panel + KTK_PANEL * 4 + group / 2 * KTK_PANEL + v * LANES;
    float by[LANES];
    for (int n = 0; n < LANES; n++)
        by[n] = ktk_levels[BITS].multipliers[group % 2 ? both[n] >> 4 : both[n] & 15];
    return VF_MUL(scale, VF_LOAD(by));
}

INLINE void decode_levels(const int BITS, const ktk_matrix *w, const uint8_t *panel, int first,
                          int num_k, float *out) {
    const VI zero = VI_SET8(KTK_LEVEL_ZERO);
    const VI levels = VI_SUB8(VI_LOAD_TABLE(ktk_levels[BITS].levels), zero);
    const uint8_t *unit = panel + level_codes_at(w, BITS, first);
    for (int k = 0; k < num_k; k += 32, unit += LEVEL_UNIT_BYTES * BITS) UNROLL
    for (int pair = 0; pair < 4; pair++) UNROLL
    for (int v = 0; v < PV; v++) {
        const int at = k + 8 * pair;
        VI low, high;
        level_pair(BITS, unit, pair, v * 4 * LANES, &low, &high);
        put_8(VI_SHUFFLE8(levels, low), VI_SHUFFLE8(levels, high),
              level_scale(BITS, w, panel, first + at, v), out + at * KTK_PANEL + v * LANES);
    }
}

#define DECODE_LEVELS(BITS)                                                                        \
    static void decode_nl##BITS(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,   \
                                float *out) {                                                      \
        decode_levels(BITS, w, panel, first, num_k, out);                                          \
    }
DECODE_LEVELS(2)
DECODE_LEVELS(3)
DECODE_LEVELS(4)

INLINE void decode_coded(const int FORMAT, const ktk_matrix *w, const uint8_t *panel, int first,
                         int num_k, float *out) {
    const VF value_up = VF_SET(HAS_4_BITS(FORMAT) ? 1.0f : 1 / fp8_down(FORMAT));
    const VF tensor = VF_SET(tensor_scale(FORMAT, w, panel));
    coded_values(FORMAT, w, panel, first, num_k, out);
    for (int k = 0; k < num_k; k += 8) { /* no group is smaller */
        VF scale[PV];
        coded_scales(FORMAT, panel, (first + k) / w->group_size, scale);
        if (FORMAT == KTK_NVFP4) UNROLL
        for (int v = 0; v < PV; v++)
            scale[v] = VF_MUL(VF_MUL(scale[v], VF_SET(1 / SCALE_DOWN)), tensor);
        for (int q = k; q < k + 8; q++) UNROLL
        for (int v = 0; v < PV; v++) {
            float *at = out + q * KTK_PANEL + v * LANES;
            VF_STORE(at, VF_MUL(VF_MUL(VF_LOAD(at), value_up), scale[v]));
        }
    }
}

#define DECODE_CODED(ENUM, NAME)                                                                   \
    static void decode_##NAME(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,     \
                              float *out) {                                                        \
        decode_coded(KTK_##ENUM, w, panel, first, num_k, out);                                     \
    }
KTK_CODED_FORMATS(DECODE_CODED)

/* [K/2][16][2] */
static void decode_bf16(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                        float *out) {
    const VI high = VI_SET32((int)0xffff0000u);
    const uint8_t *codes = panel + w->code_offset + (int64_t)first * KTK_PANEL * 2;
    for (int k = 0; k < num_k; k += 2, codes += 4 * KTK_PANEL) UNROLL
    for (int v = 0; v < PV; v++) {
        const VI two = VI_LOAD(codes + v * 4 * LANES);
        VF_STORE(out + k * KTK_PANEL + v * LANES, VF_BITS(VI_SLL32(two, 16)));
        VF_STORE(out + (k + 1) * KTK_PANEL + v * LANES, VF_BITS(VI_AND(two, high)));
    }
}

static void decode_fp32(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                        float *out) {
    memcpy(out, panel + w->code_offset + (int64_t)first * KTK_PANEL * 4,
           (size_t)num_k * KTK_PANEL * 4);
}

#define DECODE_ROW(ENUM, NAME) [KTK_##ENUM] = decode_##NAME,
const ktk_kernels CAT(ktk_products_f32_, KTK_ISA) = {
    .name = KTK_TEXT(KTK_ISA),
    .decode = {[KTK_NL2] = decode_nl2,
               [KTK_NL3] = decode_nl3,
               [KTK_NL4] = decode_nl4,
               [KTK_INT4] = decode_int4,
               [KTK_INT8] = decode_int8,
               KTK_CODED_FORMATS(DECODE_ROW)[KTK_BF16] = decode_bf16,
               [KTK_FP32] = decode_fp32},
    .product_nt = CAT(ktk_product_nt_, KTK_ISA),
    .product_nn = CAT(ktk_product_nn_, KTK_ISA),
    .activate_back = CAT(ktk_activate_back_, KTK_ISA),
    .rotate_back = CAT(ktk_rotate_back_, KTK_ISA),
    .drop = CAT(ktk_drop_, KTK_ISA),
};
