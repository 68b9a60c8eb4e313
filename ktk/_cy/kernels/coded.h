/* Codes of checkpoints, their scales and zero points to fp32, exactly:
 * KTK_CODED_FORMATS.
 *
 * fp8: the low seven bits of e4m3 are the exponent and mantissa of a half whose
 * exponent is 8 smaller: shifted by seven they become fp16, denormals too, and
 * VCVTPH2PS then 256 is exact. e5m2 is the upper half of fp16. AVX2, 32
 * weights: a load, two unpackings, four shifts and masks, two extracts, four
 * conversions and products.
 *
 * 4 bits: every value is a bf16, so two tables of 16 bytes give its halves, and
 * four k of a vector of channels come of 9 operations: a mask, two VPSHUFB, two
 * unpackings, and four shifts or masks.
 *
 * Scales come first in a panel: see ktk/experts/layout.py. */
#ifndef KTK_CODED_H
#define KTK_CODED_H

#include <string.h>

#include "ktk_kernels.h"
#include "vec.h"

INLINE int has_4_bits(const int FORMAT) {
    return FORMAT == KTK_MXFP4 || FORMAT == KTK_NVFP4 || FORMAT == KTK_INT4_ASYM;
}

/* Halves, of codes that are their upper bytes: of e4m3 the sign stays and the
 * rest moves on by one, which makes a half that is 2^8 too small. */
INLINE __m256i fp8_halves(const int FORMAT, __m256i codes) {
    if (FORMAT == KTK_FP8_E5M2) return codes;
    return _mm256_and_si256(_mm256_srai_epi16(codes, 1), _mm256_set1_epi16((short)0xbf80));
}

/* Codes of 8 bits: one k of 16 channels, times `by` where they are e4m3. */
INLINE void fp8_weights(const int FORMAT, const uint8_t *codes, float by, VF w[PV]) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
    const __m256i half = fp8_halves(FORMAT, _mm256_slli_epi16(wide, 8));
#ifdef __AVX512F__
    w[0] = VF_HALF(half);
#else
    w[0] = VF_HALF(_mm256_castsi256_si128(half));
    w[1] = VF_HALF(_mm256_extracti128_si256(half, 1));
#endif
    if (FORMAT == KTK_FP8_E5M2) return;
    UNROLL
    for (int v = 0; v < PV; v++) w[v] = VF_MUL(w[v], VF_SET(256.0f * by));
}

/* Two k of 16 channels. */
INLINE void fp8_two(const int FORMAT, const uint8_t *codes, VF w[2][PV]) {
#ifdef __AVX512F__
    fp8_weights(FORMAT, codes, 1.0f, w[0]);
    fp8_weights(FORMAT, codes + KTK_PANEL, 1.0f, w[1]);
#else
    const VI both = VI_LOAD(codes), zero = VI_ZERO(); /* a k in each lane */
    UNROLL
    for (int v = 0; v < PV; v++) {
        const VI upper = v ? VI_UNPACK_HIGH8(zero, both) : VI_UNPACK_LOW8(zero, both);
        const VI half = fp8_halves(FORMAT, upper);
        w[0][v] = VF_HALF(_mm256_castsi256_si128(half));
        w[1][v] = VF_HALF(_mm256_extracti128_si256(half, 1));
        if (FORMAT == KTK_FP8_E5M2) continue;
        UNROLL
        for (int i = 0; i < 2; i++) w[i][v] = VF_MUL(w[i][v], VF_SET(256.0f));
    }
#endif
}

/* Lower and upper bytes of the values as bf16: of e2m1, of 0 to 15. */
static const uint8_t ktk_e2m1[2][16]
    __attribute__((aligned(16))) = {{0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0, 0x00, 0x00,
                                     0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0},
                                    {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf,
                                     0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0}};
static const uint8_t ktk_u4[2][16]
    __attribute__((aligned(16))) = {{0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0, 0x00, 0x10,
                                     0x20, 0x30, 0x40, 0x50, 0x60, 0x70},
                                    {0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, 0x41, 0x41,
                                     0x41, 0x41, 0x41, 0x41, 0x41, 0x41}};
/* Bytes of a channel's four k, (0 1 2 3), to (0 1) of four channels and then (2
 * 3). */
static const uint8_t ktk_in_twos[16]
    __attribute__((aligned(16))) = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};

typedef struct {
    VI low, high, order, nibble, odd;
} tables_4;

INLINE tables_4 tables_of(const int FORMAT) {
    const uint8_t (*halves)[16] = FORMAT == KTK_INT4_ASYM ? ktk_u4 : ktk_e2m1;
    return (tables_4){VI_LOAD_TABLE(halves[0]), VI_LOAD_TABLE(halves[1]),
                      VI_LOAD_TABLE(ktk_in_twos), VI_SET8(15), VI_SET32((int)0xffff0000u)};
}

/* Eight k of LANES channels, to be taken apart by four_weights: the low nibbles
 * are the first four.
 */
INLINE VI load_4(const tables_4 *t, const uint8_t *codes) {
    return VI_SHUFFLE8(VI_LOAD(codes), t->order);
}

INLINE void four_weights(const tables_4 *t, VI both, const int HALF, VF w[4]) {
    const VI code = VI_AND(HALF ? VI_SRL16(both, 4) : both, t->nibble);
    const VI low = VI_SHUFFLE8(t->low, code), high = VI_SHUFFLE8(t->high, code);
    const VI first = VI_UNPACK_LOW8(low, high), last = VI_UNPACK_HIGH8(low, high);
    w[0] = VF_BITS(VI_SLL32(first, 16));
    w[1] = VF_BITS(VI_AND(first, t->odd));
    w[2] = VF_BITS(VI_SLL32(last, 16));
    w[3] = VF_BITS(VI_AND(last, t->odd));
}

/* Of a group of k. */
INLINE void coded_scales(const int FORMAT, const ktk_matrix *w, const uint8_t *panel, int group,
                         VF scale[PV]) {
    const int64_t at = (int64_t)group * KTK_PANEL;
    if (FORMAT == KTK_NVFP4) { /* e4m3 [groups][16], then the matrix's */
        float by;
        memcpy(&by, panel + (int64_t)w->padded_in / w->group_size * KTK_PANEL, 4);
        fp8_weights(KTK_FP8, panel + at, by, scale);
        return;
    }
    UNROLL
    for (int v = 0; v < PV; v++) {
        if (FORMAT == KTK_FP8)
            scale[v] = VF_SET(((const float *)panel)[group]);
        else if (FORMAT == KTK_FP8_CHANNEL || FORMAT == KTK_FP8_E5M2)
            scale[v] = VF_LOAD(panel + v * LANES * 4);
        else if (FORMAT == KTK_INT4_ASYM)
            scale[v] = VF_LOAD_HALF(panel + 2 * (at + v * LANES));
        else { /* e8m0: code 0 is 2^-127, which has no exponent bits of its own */
            const VI power = VI_SLL32(VI_LOAD_U8(panel + at + v * LANES), 23);
            scale[v] = VF_BITS(VI_MAX_U32(power, VI_SET32(0x00400000)));
        }
    }
}

/* A group's zero points, of INT4_ASYM: u4 behind its scales, the even group in
 * the low nibbles. */
INLINE void zero_points(const ktk_matrix *w, const uint8_t *panel, int group, VF zero[PV]) {
    const int groups = (w->padded_in + w->group_size - 1) / w->group_size;
    const uint8_t *pairs = panel + ((int64_t)groups * 2 + group / 2) * KTK_PANEL;
    UNROLL
    for (int v = 0; v < PV; v++) {
        const VI both = VI_LOAD_U8(pairs + v * LANES);
        zero[v] = VF_CVT(group % 2 ? VI_SRL32(both, 4) : VI_AND(both, VI_SET32(15)));
    }
}

/* k [first, first + num_k), of whole groups or within one, multiples of 8, to
 * values [num_k][16], not scaled. */
INLINE void coded_values(const int FORMAT, const ktk_matrix *w, const uint8_t *panel, int first,
                         int num_k, float *out) {
    const uint8_t *codes = panel + w->code_offset;
    if (!has_4_bits(FORMAT)) {
        for (int k = 0; k < num_k; k += 2) {
            VF value[2][PV];
            fp8_two(FORMAT, codes + (int64_t)(first + k) * KTK_PANEL, value);
            UNROLL
            for (int i = 0; i < 2; i++) UNROLL
            for (int v = 0; v < PV; v++)
                VF_STORE(out + (k + i) * KTK_PANEL + v * LANES, value[i][v]);
        }
        return;
    }
    const tables_4 tables = tables_of(FORMAT);
    for (int k = 0; k < num_k; k += 8) {
        VF zero[PV];
        if (FORMAT == KTK_INT4_ASYM) zero_points(w, panel, (first + k) / w->group_size, zero);
        UNROLL
        for (int v = 0; v < PV; v++) {
            const VI both = load_4(&tables, codes + (int64_t)(first + k) * 8 + v * 4 * LANES);
            UNROLL
            for (int half = 0; half < 2; half++) {
                VF value[4];
                four_weights(&tables, both, half, value);
                UNROLL
                for (int i = 0; i < 4; i++) {
                    if (FORMAT == KTK_INT4_ASYM) value[i] = VF_SUB(value[i], zero[v]);
                    VF_STORE(out + (k + 4 * half + i) * KTK_PANEL + v * LANES, value[i]);
                }
            }
        }
    }
}

#endif
