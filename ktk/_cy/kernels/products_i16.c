/* Transposed products of integer panels for the backward pass (train.c), at twice fp32's rate;
 * compiled once per ISA row.
 *
 * c[m][k] = sum over channels n of d[m][n] * scale[n] * code[n][k]: the scale belongs to a channel
 * and a group of k, so it goes into d, which is then rounded to 15 bits and a sign, one scale for
 * the channels of a call. Codes are exact. VPMADDWD (VPDPWSSD) adds neighbouring channels; the sums
 * of 512 channels fit: 512 * 32767 * 127 < 2^31. They are exact, so their order does not count.
 *
 * Vectors of 256 bits everywhere: 16 channels of one k. 3 x 4 sums, 2 rows of d, codes and a
 * product fill 16 registers, the third row comes from memory; levels with 32 take 6 x 4. Channels
 * lie as VPACKSSDW leaves them: 0-3, 8-11, 4-7, 12-15, in d and codes alike. VPMADDWD, VPACKSSDW:
 * Intel SDM vol. 2.
 *
 * Symbols: ktk_product_i16_avx2 ktk_product_i16_avx512 ktk_product_i16_avx512vnni
 *   ktk_round_i16_avx2 ktk_round_i16_avx512 ktk_round_i16_avx512vnni
 *   ktk_largest_avx2 ktk_largest_avx512 ktk_largest_avx512vnni. */
#include <math.h>
#include <string.h>

#include "ktk_kernels.h"
#include "level_codes.h"
#include "row.h"
#include "vec.h"

#ifdef __AVX512F__
enum { ROWS = 6 };
#else
enum { ROWS = 3 };
#endif
enum { COLUMNS = 4, ROW_BYTES = 16 << 10 };

/* acc += sums of neighbouring products; LAST: the product may take w's register. In the order
 * written: GCC would make trees of the sums, and has no registers for them. */
#ifdef __AVX512VNNI__
#define ADD_PRODUCTS(acc, w, x) __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "vm"(x))
#define ADD_LAST_PRODUCTS ADD_PRODUCTS
#else
#define ADD_PRODUCTS(acc, w, x)                                                                    \
    do {                                                                                           \
        __m256i product;                                                                           \
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"                                         \
                : "+v"(acc), "=&v"(product)                                                        \
                : "v"(w), "v"(x));                                                                 \
    } while (0)
#define ADD_LAST_PRODUCTS(acc, w, x)                                                               \
    __asm__("vpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "+v"(w) : "m"(x))
#endif

INLINE __m256i load(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

INLINE void tile(const int MR, const ktk_product_i16 *p, int row, const int16_t *b, int columns,
                 float *c) {
    __m256i sum[ROWS][COLUMNS];
    const int16_t *a = p->a + row * p->a_stride, *column[COLUMNS];
    UNROLL
    for (int j = 0; j < COLUMNS; j++) column[j] = b + (j < columns ? j : 0) * KTK_PANEL;
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int j = 0; j < COLUMNS; j++) sum[m][j] = _mm256_setzero_si256();
    for (int64_t panel = 0, at = 0; panel < p->num_panels; panel++, at += p->b_panel) {
        const int16_t *last = a + (MR - 1) * p->a_stride + 16 * panel;
        __m256i x[ROWS];
        UNROLL
        for (int m = 0; m < MR - 1; m++) x[m] = load(a + m * p->a_stride + 16 * panel);
        UNROLL
        for (int j = 0; j < COLUMNS; j++) {
            __m256i w = load(column[j] + at);
            UNROLL
            for (int m = 0; m < MR - 1; m++) ADD_PRODUCTS(sum[m][j], w, x[m]);
            ADD_LAST_PRODUCTS(sum[MR - 1][j], w, *(const __m256i_u *)last);
        }
    }
    UNROLL
    for (int m = 0; m < MR; m++) {
        const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[m][0], sum[m][1]),
                                              _mm256_hadd_epi32(sum[m][2], sum[m][3]));
        const __m128i four =
            _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
        const __m128 value = _mm_cvtepi32_ps(four), scale = _mm_set1_ps(p->scales[row + m]);
        float *at = c + m * p->c_stride;
        if (columns == COLUMNS) {
            const __m128 before = p->is_added ? _mm_loadu_ps(at) : _mm_setzero_ps();
            _mm_storeu_ps(at, _mm_fmadd_ps(value, scale, before));
            continue;
        }
        float each[COLUMNS];
        _mm_storeu_ps(each, _mm_mul_ps(value, scale));
        for (int j = 0; j < columns; j++) at[j] = p->is_added ? at[j] + each[j] : each[j];
    }
}

void CAT(ktk_product_i16_, KTK_ISA)(const ktk_product_i16 *p) {
    int most = ROW_BYTES / 32 / (p->num_panels ? p->num_panels : 1) / ROWS * ROWS;
    if (most < ROWS) most = ROWS;
    for (int first = 0; first < p->num_rows; first += most) {
        const int end = first + most < p->num_rows ? first + most : p->num_rows;
        for (int j = 0; j < p->num_columns; j += COLUMNS) {
            const int columns = p->num_columns - j < COLUMNS ? p->num_columns - j : COLUMNS;
            const int16_t *b = p->b + (int64_t)j * KTK_PANEL;
            for (int i = first; i < end; i += ROWS) {
                float *c = p->c + i * p->c_stride + j;
                switch (end - i < ROWS ? end - i : ROWS) {
#define TILE(MR)                                                                                   \
    case MR:                                                                                       \
        tile(MR, p, i, b, columns, c);                                                             \
        break;
                    TILE(1)
                    TILE(2)
                    TILE(3)
#ifdef __AVX512F__
                    TILE(4)
                    TILE(5)
                    TILE(6)
#endif
#undef TILE
                }
            }
        }
    }
}

float CAT(ktk_largest_, KTK_ISA)(const float *x, const float *scales, int n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        if (scales) v = _mm256_mul_ps(v, _mm256_loadu_ps(scales + i));
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    }
    uint32_t each[8], bits = 0;
    _mm256_storeu_si256((__m256i *)each, most);
    for (int i = 0; i < 8; i++) bits = each[i] > bits ? each[i] : bits;
    float found;
    memcpy(&found, &bits, 4);
    return found < INFINITY ? found : NAN;
}

void CAT(ktk_round_i16_, KTK_ISA)(const float *x, float by, const float *scales, int n,
                                  int16_t *out) {
    const __m256 factor = _mm256_set1_ps(by);
    for (int i = 0; i < n; i += 16) {
        const __m256 a = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(scales + i)),
                     b = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8), _mm256_loadu_ps(scales + i + 8));
        const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(a, factor)),
                      high = _mm256_cvtps_epi32(_mm256_mul_ps(b, factor));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_packs_epi32(low, high));
    }
}

/* -- panels: codes of k [first, first + num_k), a multiple of 32, int16 [k][16] */

/* Byte i of eight dwords each, to 16 words. */
INLINE void put_bytes(__m256i low, __m256i high, int i, int16_t *out) {
    const __m256i a = _mm256_srai_epi32(_mm256_slli_epi32(low, 24 - 8 * i), 24),
                  b = _mm256_srai_epi32(_mm256_slli_epi32(high, 24 - 8 * i), 24);
    _mm256_storeu_si256((__m256i *)out, _mm256_packs_epi32(a, b));
}

INLINE __m256i load_bytes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

static void codes_int8(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                       int16_t *out) {
    const __m256i flip = _mm256_set1_epi8((char)0x80);
    const uint8_t *codes = panel + w->code_offset + (int64_t)first * KTK_PANEL;
    for (int k = 0; k < num_k; k += 4, codes += 64, out += 64) {
        const __m256i low = _mm256_xor_si256(load_bytes(codes), flip),
                      high = _mm256_xor_si256(load_bytes(codes + 32), flip);
        UNROLL
        for (int i = 0; i < 4; i++) put_bytes(low, high, i, out + 16 * i);
    }
}

static void codes_int4(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                       int16_t *out) {
    const __m256i mask = _mm256_set1_epi8(15), zero = _mm256_set1_epi8(8);
    const uint8_t *codes = panel + w->code_offset + (int64_t)first * KTK_PANEL / 2;
    for (int k = 0; k < num_k; k += 8, codes += 64) {
        const __m256i low = load_bytes(codes), high = load_bytes(codes + 32);
        UNROLL
        for (int four = 0; four < 2; four++, out += 64) {
            const __m256i a = four ? _mm256_srli_epi16(low, 4) : low,
                          b = four ? _mm256_srli_epi16(high, 4) : high;
            UNROLL
            for (int i = 0; i < 4; i++)
                put_bytes(_mm256_sub_epi8(_mm256_and_si256(a, mask), zero),
                          _mm256_sub_epi8(_mm256_and_si256(b, mask), zero), i, out + 16 * i);
        }
    }
}

#ifdef __AVX512F__
LEVEL_PAIR(level_pair_256, __m256i, load_bytes, _mm256_and_si256, _mm256_or_si256,
           _mm256_srli_epi16, _mm256_set1_epi8)
#else
#define level_pair_256 level_pair
#endif

/* Words of eight channels' multipliers for 16 k: a word times each byte's dword neighbours. */
INLINE void codes_of_levels(const int BITS, const ktk_matrix *w, const uint8_t *panel, int first,
                            int num_k, int16_t *out) {
    const ktk_level_numbers *numbers = &ktk_levels[BITS];
    const __m256i levels = _mm256_sub_epi8(
        _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)numbers->levels)),
        _mm256_set1_epi8(KTK_LEVEL_ZERO));
    const uint8_t *unit = panel + level_codes_at(w, BITS, first);
    int16_t *to = out;
    for (int k = 0; k < num_k; k += 32, unit += LEVEL_UNIT_BYTES * BITS) UNROLL
    for (int pair = 0; pair < 4; pair++, to += 128) {
        __m256i index[2][2]; /* [four k][channels 0 to 7, 8 to 15] */
        UNROLL
        for (int half = 0; half < 2; half++)
            level_pair_256(BITS, unit, pair, 32 * half, &index[0][half], &index[1][half]);
        UNROLL
        for (int four = 0; four < 2; four++) {
            const __m256i low = _mm256_shuffle_epi8(levels, index[four][0]),
                          high = _mm256_shuffle_epi8(levels, index[four][1]);
            UNROLL
            for (int i = 0; i < 4; i++) put_bytes(low, high, i, to + 64 * four + 16 * i);
        }
    }
    if (!w->multiplier_group) return;
    const __m128i table = _mm_load_si128((const __m128i *)numbers->multipliers);
    for (int k = first; k < first + num_k; k += 16) {
        const int group = k / w->multiplier_group;
        __m128i both =
            _mm_loadu_si128((const __m128i *)(panel + KTK_PANEL * 4 + group / 2 * KTK_PANEL));
        both = _mm_and_si128(group % 2 ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
        const __m128i by = _mm_shuffle_epi8(table, both);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_cvtepi8_epi16(by), 0xd8);
        for (int i = 0; i < 16; i++, out += 16)
            _mm256_storeu_si256((__m256i *)out, _mm256_mullo_epi16(load(out), words));
    }
}

#define CODES_OF_LEVELS(BITS)                                                                      \
    static void codes_nl##BITS(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,    \
                               int16_t *out) {                                                     \
        codes_of_levels(BITS, w, panel, first, num_k, out);                                        \
    }
CODES_OF_LEVELS(2)
CODES_OF_LEVELS(3)
CODES_OF_LEVELS(4)

static void scales_of(const ktk_matrix *w, const uint8_t *panel, int k, float *out) {
    const int at = k / w->group_size * KTK_PANEL;
    for (int n = 0; n < KTK_PANEL; n += 8) {
        if (w->scales_are_bf16) {
            const __m128i bits = _mm_loadu_si128((const __m128i *)(panel + 2 * (at + n)));
            _mm256_storeu_ps(
                out + n, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
        } else {
            memcpy(out + n, panel + 4 * (at + n), 32);
        }
    }
}

const ktk_kernels CAT(ktk_products_i16_, KTK_ISA) = {
    .name = KTK_TEXT(KTK_ISA),
    .codes = {[KTK_NL2] = codes_nl2,
              [KTK_NL3] = codes_nl3,
              [KTK_NL4] = codes_nl4,
              [KTK_INT4] = codes_int4,
              [KTK_INT8] = codes_int8},
    .scales = scales_of,
    .product_i16 = CAT(ktk_product_i16_, KTK_ISA),
    .largest = CAT(ktk_largest_, KTK_ISA),
    .round_i16 = CAT(ktk_round_i16_, KTK_ISA),
};
