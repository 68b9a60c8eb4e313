/* Codes of checkpoints, their scales and zero points to fp32, exactly:
 * KTK_CODED_FORMATS.
 *
 * fp8 on AVX2: moved to the right by four (e5m2: three) a code is a bf16 whose exponent is 120
 * (112) smaller, denormals too, and the two of a dword become fp32 by a shift and a mask. Four k of
 * 8 channels: three shifts and two masks, then two and two. Values stay that small, and rows come
 * 2^64 larger (KTK_CODES_F32_HIGH), so that sums keep their bits; what is too small is made good
 * with the scale, once a group. Zen has no penalty for denormals. Intel has, but weights below
 * 2^-6 of a block whose largest is 448 are rare. AVX-512: the low seven bits of e4m3 are the
 * exponent and mantissa of a half whose exponent is 8 smaller, which VCVTPH2PS takes.
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

#define HAS_4_BITS(FORMAT)                                                                         \
    ((FORMAT) == KTK_MXFP4 || (FORMAT) == KTK_NVFP4 || (FORMAT) == KTK_INT4_ASYM)

/* Four k of LANES channels, times fp8_down. */
INLINE void fp8_four(const int FORMAT, const uint8_t *codes, VF w[4]) {
    const int IS_E5M2 = FORMAT == KTK_FP8_E5M2;
    const VI all = VI_LOAD(codes);
#ifdef __AVX512F__
    const VI kept = VI_SET32(IS_E5M2 ? 0xff00 : 0xbf80);
    UNROLL
    for (int i = 0; i < 4; i++) {
        VI upper = i < 3 ? VI_SLL32(all, 24 - 8 * i) : all;
        upper = VI_SRA32(upper, IS_E5M2 ? 16 : 17);
        w[i] = VF_LOW_HALF(VI_AND(upper, kept));
    }
#else
    const int shift = IS_E5M2 ? 3 : 4;
    const VI kept = VI_SET16((short)(IS_E5M2 ? 0x8fe0 : 0x87f0)), high = VI_SET32((int)0xffff0000u);
    const VI even = VI_AND(VI_SRA16(VI_SLL16(all, 8), shift), kept);
    const VI odd = VI_AND(VI_SRA16(all, shift), kept);
    w[0] = VF_BITS(VI_SLL32(even, 16));
    w[1] = VF_BITS(VI_SLL32(odd, 16));
    w[2] = VF_BITS(VI_AND(even, high));
    w[3] = VF_BITS(VI_AND(odd, high));
#endif
}

#ifdef __AVX512F__
INLINE float fp8_down(const int FORMAT) { return FORMAT == KTK_FP8_E5M2 ? 1.0f : 0x1p-8f; }
#else
INLINE float fp8_down(const int FORMAT) { return FORMAT == KTK_FP8_E5M2 ? 0x1p-112f : 0x1p-120f; }
#endif

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

/* What multiplies all scales of a panel. */
INLINE float tensor_scale(const int FORMAT, const ktk_matrix *w, const uint8_t *panel) {
    float by = 1.0f;
    if (FORMAT == KTK_NVFP4) /* behind e4m3 [groups][16] */
        memcpy(&by, panel + (int64_t)w->padded_in / w->group_size * KTK_PANEL, 4);
    return by;
}

/* Of a group of k; of nvfp4 times SCALE_DOWN. */
#define SCALE_DOWN 0x1p-120f
INLINE void coded_scales(const int FORMAT, const uint8_t *panel, int group, VF scale[PV]) {
    const int64_t at = (int64_t)group * KTK_PANEL;
    UNROLL
    for (int v = 0; v < PV; v++) {
        if (FORMAT == KTK_FP8)
            scale[v] = VF_SET(((const float *)panel)[group]);
        else if (FORMAT == KTK_FP8_CHANNEL || FORMAT == KTK_FP8_E5M2)
            scale[v] = VF_LOAD(panel + v * LANES * 4);
        else if (FORMAT == KTK_INT4_ASYM)
            scale[v] = VF_LOAD_HALF(panel + 2 * (at + v * LANES));
        else if (FORMAT == KTK_NVFP4)
            scale[v] = VF_BITS(
                VI_AND(VI_SLL32(VI_I8(panel + at + v * LANES), 20), VI_SET32((int)0x87f00000u)));
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
 * values [num_k][16], not scaled; of fp8 times fp8_down. */
INLINE void coded_values(const int FORMAT, const ktk_matrix *w, const uint8_t *panel, int first,
                         int num_k, float *out) {
    const uint8_t *codes = panel + w->code_offset;
    if (!HAS_4_BITS(FORMAT)) {
        for (int k = 0; k < num_k; k += 4) UNROLL
        for (int v = 0; v < PV; v++) {
            VF value[4];
            fp8_four(FORMAT, codes + (int64_t)(first + k) * KTK_PANEL + v * 4 * LANES, value);
            UNROLL
            for (int i = 0; i < 4; i++) VF_STORE(out + (k + i) * KTK_PANEL + v * LANES, value[i]);
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
