/* From bytes to codes, scales and minima: what the decoders of blocks/ are made of, and they
 * themselves. */
#ifndef LF_DECODE_H
#define LF_DECODE_H

#include <stddef.h>

#include "grids.h"
#include "multiply.h"

/* Where what is decoded goes: multiplied with the MR rows of a tile at once, or, MR 0, laid down.
 */
typedef struct {
    laid to;
    tile rows;
    int activation_group;
    const uint8_t *ahead; /* where the strip that is wanted next goes on */
} sink;

/* The part of the next strip that 32 k of this one are worth, so that memory is read evenly and not
 * in bursts. */
INLINE void fetch_ahead(const int FORMAT, sink *s) {
    const int BYTES = LANES * TRAITS[FORMAT].bytes * 32 / TRAITS[FORMAT].weights;
    UNROLL
    for (int i = 0; i < BYTES; i += 64) _mm_prefetch((const char *)s->ahead + i, _MM_HINT_T1);
    s->ahead += BYTES;
}

/* 32 k that a decoder found. */
INLINE void put_32(const int MR, const int FORMAT, sink *s, const VI *codes, const VF *scale,
                   const VF *minimum) {
    const int FINE = TRAITS[FORMAT].fine, HAS_MIN = TRAITS[FORMAT].has_min;
    fetch_ahead(FORMAT, s);
    if (MR) {
        accumulate(MR, FINE, HAS_MIN, TRAITS[FORMAT].most, s->activation_group, &s->rows, codes,
                   scale, minimum);
        return;
    }
    UNROLL
    for (int i = 0; i < 8; i++) VI_STORE(s->to.codes + i * VI_BYTES, codes[i]);
    s->to.codes += 8 * VI_BYTES;
    UNROLL
    for (int g = 0; g < 32 / FINE; g++) {
        VF_STORE(s->to.scales + g * LANES, scale[g]);
        if (HAS_MIN) VF_STORE(s->to.minima + g * LANES, minimum[g]);
    }
    s->to.scales += 32 / FINE * LANES;
    s->to.minima += 32 / FINE * LANES;
}

/* A block in registers (small ones), or in memory: see gather. */
INLINE VI dword(block b, int i) { return b.few ? b.few[i] : VI_LOAD(b.dwords + 64 * i); }
INLINE VF half_head(block b) { return VF_HALF(b.heads); }
/* Four dwords of nibbles, low and high ones apart. */
INLINE void nibbles_16(block b, int i, VI low[4], VI high[4]) {
    const VI mask = VI_SET8(15);
    UNROLL
    for (int j = 0; j < 4; j++) {
        VI x = dword(b, i + j);
        low[j] = VI_AND(x, mask);
        high[j] = VI_AND(VI_SRL16(x, 4), mask);
    }
}
INLINE VF unsigned_byte(VI x, int i) {
    return VF_CVT(VI_AND(i ? VI_SRL32(x, 8 * i) : x, VI_SET32(255)));
}
INLINE VF signed_byte(VI x, int i) {
    return VF_CVT(VI_SRA32(i == 3 ? x : VI_SLL32(x, 24 - 8 * i), 24));
}
/* The low six bits of byte i, signed. */
INLINE VF signed_six_bits(VI x, int i) { return VF_CVT(VI_SRA32(VI_SLL32(x, 26 - 8 * i), 26)); }
INLINE VF high_half(VI x) { return VF_LOW_HALF(VI_SRL32(x, 16)); }
INLINE VF negative(VF x) { return VF_BITS(VI_XOR(VI_BITS(x), VI_SET32((int)0x80000000u))); }

/* The scales and minima of Q4_K and Q5_K: dword 0 holds halves d and dmin, 1..3 eight of each. */
typedef struct {
    VF d, minus_dmin;
    VI scales[2], minima[2]; /* a byte each */
} k_scales;

INLINE k_scales six_bit_scales(block b) {
    const VI six = VI_SET8(63), low = VI_SET8(15), high = VI_SET8(48);
    VI both = dword(b, 0), first = dword(b, 1), second = dword(b, 2), third = dword(b, 3);
    k_scales k;
    k.d = VF_LOW_HALF(both);
    k.minus_dmin = negative(high_half(both));
    k.scales[0] = VI_AND(first, six);
    k.minima[0] = VI_AND(second, six);
    k.scales[1] = VI_OR(VI_AND(third, low), VI_AND(VI_SRL16(first, 2), high));
    k.minima[1] = VI_OR(VI_AND(VI_SRL16(third, 4), low), VI_AND(VI_SRL16(second, 2), high));
    return k;
}

INLINE void put_k_group(const int MR, const int FORMAT, sink *s, const VI *codes, const k_scales *k,
                        int group) {
    VF scale[1] = {VF_MUL(k->d, unsigned_byte(k->scales[group / 4], group % 4))};
    VF minimum[1] = {VF_MUL(k->minus_dmin, unsigned_byte(k->minima[group / 4], group % 4))};
    put_32(MR, FORMAT, s, codes, scale, minimum);
}

/* Bits 2 * quarter and the next of eight dwords' bytes. */
INLINE void two_bits(block b, int i, int quarter, VI codes[8]) {
    const VI mask = VI_SET8(3);
    UNROLL
    for (int j = 0; j < 8; j++) {
        VI x = dword(b, i + j);
        codes[j] = VI_AND(quarter ? VI_SRL16(x, 2 * quarter) : x, mask);
    }
}

/* Byte i of every dword in all its four bytes. */
INLINE VI byte_everywhere(VI x, int i) {
    static const uint8_t FROM[4][16] = {{0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12},
                                        {1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13},
                                        {2, 2, 2, 2, 6, 6, 6, 6, 10, 10, 10, 10, 14, 14, 14, 14},
                                        {3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 11, 11, 15, 15, 15, 15}};
    return VI_SHUFFLE8(x, VI_LOAD_TABLE(FROM[i]));
}

/* Bit k of a dword belongs to code k: these are the masks for even and odd dwords of codes. */
INLINE VI nibble_bits(int is_odd) { return VI_SET32(is_odd ? (int)0x80402010u : 0x08040201); }

INLINE void add_16_where_bits(VI codes[8], VI bits) {
    UNROLL
    for (int i = 0; i < 8; i++) {
        VI more = VI_ADD8(codes[i], VI_SET8(16));
        codes[i] = VI_WHERE_BIT(byte_everywhere(bits, i / 2), nibble_bits(i % 2), more, codes[i]);
    }
}

/* Values of nibbles, plus the format's zero point. */
static const uint8_t IQ4_TABLE[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                      129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t MXFP4_TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
INLINE void look_up_16(const uint8_t *table, VI codes[8]) {
    const VI values = VI_LOAD_TABLE(table);
    UNROLL
    for (int i = 0; i < 8; i++) codes[i] = VI_SHUFFLE8(values, codes[i]);
}

/* The integer part of 3 * x / 256 of each byte; x becomes the fraction: (x > 85) + (x > 170). */
INLINE VI ternary_digit(VI *x) {
    const VI one = VI_SET8(1);
    VI digit = VI_ADD8(VI_MIN_U8(VI_SUBS_U8(*x, VI_SET8(85)), one),
                       VI_MIN_U8(VI_SUBS_U8(*x, VI_SET8((char)170)), one));
    *x = VI_ADD8(VI_ADD8(*x, *x), *x);
    return digit;
}

/* -- grids */

/* Entries of 8 bytes at LANES indices, of `bytes` bytes, 4 bytes apart: two dwords a lane. Scalar
 * loads: Zen 4 takes 20 cycles for a gather of 16 dwords. */
INLINE void grid_8(const uint64_t *grid, const uint8_t *index, const int bytes, VI out[2]) {
#define ENTRY(n) (grid + (bytes == 1 ? index[4 * (n)] : load16(index + 4 * (n))))
    __m256i low[LANES / 8], high[LANES / 8];
    UNROLL
    for (int i = 0; i < LANES / 8; i++) {
        __m128 pairs[4]; /* of lanes */
        UNROLL
        for (int j = 0; j < 4; j++) {
            pairs[j] = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)ENTRY(8 * i + 2 * j)));
            pairs[j] = _mm_loadh_pi(pairs[j], (const __m64 *)ENTRY(8 * i + 2 * j + 1));
        }
        __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(pairs[0]), pairs[2], 1);
        __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(pairs[1]), pairs[3], 1);
        low[i] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
        high[i] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
    }
#ifdef __AVX512F__
    out[0] = _mm512_inserti64x4(_mm512_castsi256_si512(low[0]), low[1], 1);
    out[1] = _mm512_inserti64x4(_mm512_castsi256_si512(high[0]), high[1], 1);
#else
    out[0] = low[0];
    out[1] = high[0];
#endif
#undef ENTRY
}

/* The same for entries of 4 bytes. */
INLINE VI grid_4(const uint32_t *grid, const uint8_t *index, const int bytes) {
#define ENTRY(n) (int)grid[bytes == 1 ? index[4 * (n)] : load16(index + 4 * (n))]
    __m128i x[LANES / 4];
    UNROLL
    for (int i = 0; i < LANES / 4; i++) {
        x[i] = _mm_cvtsi32_si128(ENTRY(4 * i));
        x[i] = _mm_insert_epi32(x[i], ENTRY(4 * i + 1), 1);
        x[i] = _mm_insert_epi32(x[i], ENTRY(4 * i + 2), 2);
        x[i] = _mm_insert_epi32(x[i], ENTRY(4 * i + 3), 3);
    }
    __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
#ifdef __AVX512F__
    __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(x[2]), x[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    return low;
#endif
#undef ENTRY
}

/* Indices of more than eight bits, stored as words: at[0] those of bytes 0 and 2 of `bytes`, at[1]
 * of 1 and 3. Where their high bits are, masked by `mask`: one dword for each byte. */
INLINE void word_indices(VI bytes, uint8_t at[][64], VI mask, VI high_0, VI high_2, VI high_1,
                         VI high_3) {
    const VI low = VI_SET32(0x00ff00ff), first = VI_SET32(0x0000ffff);
    VI even = VI_OR(VI_AND(high_0, first), VI_ANDNOT(first, high_2));
    VI odd = VI_OR(VI_AND(high_1, first), VI_ANDNOT(first, high_3));
    VI_STORE(at[0], VI_OR(VI_AND(bytes, low), VI_AND(even, mask)));
    VI_STORE(at[1], VI_OR(VI_AND(VI_SRL16(bytes, 8), low), VI_AND(odd, mask)));
}

/* Bit 7 of each byte becomes the parity of the other seven: an even number of signs. */
INLINE VI with_parity(VI x) {
    static const uint8_t PARITY[16] = {0,   128, 128, 0,   128, 0,   0,   128,
                                       128, 0,   0,   128, 0,   128, 128, 0};
    const VI table = VI_LOAD_TABLE(PARITY), mask = VI_SET8(15);
    VI parity = VI_XOR(VI_SHUFFLE8(table, VI_AND(x, mask)),
                       VI_SHUFFLE8(table, VI_AND(VI_SRL16(x, 4), mask)));
    return VI_OR(x, parity);
}

/* Four times seven bits of sign from a dword's lowest, a byte each. */
INLINE VI seven_bit_signs(VI x) {
    VI a = VI_AND(x, VI_SET32(0x7f)), b = VI_AND(VI_SLL32(x, 1), VI_SET32(0x7f00));
    VI c = VI_AND(VI_SLL32(x, 2), VI_SET32(0x7f0000)),
       d = VI_AND(VI_SLL32(x, 3), VI_SET32(0x7f000000));
    return with_parity(VI_OR(VI_OR(a, b), VI_OR(c, d)));
}

INLINE VI swap_middle_bytes(VI x) {
    static const uint8_t FROM[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
    return VI_SHUFFLE8(x, VI_LOAD_TABLE(FROM));
}

/* Code k is negated about half of `twice_zero` where bit k of `signs` is set. */
INLINE void negate_where(VI codes[8], VI signs, int twice_zero) {
    UNROLL
    for (int i = 0; i < 8; i++) {
        VI negated = VI_SUB8(VI_SET8((char)twice_zero), codes[i]);
        codes[i] =
            VI_WHERE_BIT(byte_everywhere(signs, i / 2), nibble_bits(i % 2), negated, codes[i]);
    }
}

/* (nibble i + 1 / 2) / 4 */
INLINE VF quarter_scale(VI x, int i) {
    VI nibble = VI_AND(i ? VI_SRL32(x, 4 * i) : x, VI_SET32(15));
    return VF_FMA(VF_CVT(nibble), VF_SET(0.25f), VF_SET(0.125f));
}
/* 2 * (three bits at `bit`) + 1 */
INLINE VF odd_scale(VI x, int bit) {
    VI twice = bit ? VI_SRL32(x, bit - 1) : VI_SLL32(x, 1);
    return VF_CVT(VI_OR(VI_AND(twice, VI_SET32(14)), VI_SET32(1)));
}

#include "blocks/q4_0.h"
#include "blocks/q4_1.h"
#include "blocks/q5_0.h"
#include "blocks/q5_1.h"
#include "blocks/q8_0.h"
#include "blocks/q2_k.h"
#include "blocks/q3_k.h"
#include "blocks/q4_k.h"
#include "blocks/q5_k.h"
#include "blocks/q6_k.h"
#include "blocks/iq4_nl.h"
#include "blocks/iq4_xs.h"
#include "blocks/mxfp4.h"
#include "blocks/tq1_0.h"
#include "blocks/tq2_0.h"
#include "blocks/iq1_s.h"
#include "blocks/iq1_m.h"
#include "blocks/iq2_xxs.h"
#include "blocks/iq2_xs.h"
#include "blocks/iq2_s.h"
#include "blocks/iq3_xxs.h"
#include "blocks/iq3_s.h"
#include "ik.h"
#include "blocks/iq2_k.h"
#include "blocks/iq3_k.h"
#include "blocks/iq4_k.h"
#include "blocks/iq5_k.h"
#include "blocks/iq6_k.h"
#include "blocks/iq2_ks.h"
#include "blocks/iq3_ks.h"
#include "blocks/iq4_ks.h"
#include "blocks/iq5_ks.h"
#include "blocks/iq4_kss.h"
#include "blocks/iq2_kl.h"
#include "blocks/iq1_kt.h"
#include "blocks/iq2_kt.h"
#include "blocks/iq3_kt.h"
#include "blocks/iq4_kt.h"

typedef void decode_fn(const int MR, block b, sink *s);

#endif
