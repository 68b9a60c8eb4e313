/* What was laid down times rows of activations: the only arithmetic there is.
 *
 *   sum = correction + sum of code * activation                exactly, in int32, over `fine` k
 *   inner = fma(sum, scale, inner)                             over an activation group, and, where
 * there are minima, inner = fma(sum of activations, minimum, inner) y = fma(inner, activation
 * scale, y)
 *
 * Float formats: one chain of fma (VDPBF16PS) for even and one for odd k (dwords), added at the
 * end.
 *
 * Registers with 512 bits, 8 rows: 8 sums, 8 inner, 8 y, codes, scale, minimum. VPDPBUSD,
 * VPMADDUBSW, VDPBF16PS: Intel SDM vol. 2. */
#ifndef LF_MULTIPLY_H
#define LF_MULTIPLY_H

#include <stddef.h>

#include "gather.h"

#ifdef __AVX512BF16__
enum { HAS_BF16 = 1 };
/* y += two bf16 products a lane, the same two activations at p for all. */
#define VF_DOT_BF16_BROADCAST(y, w, p)                                                             \
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(y) : "v"(w), "m"(*(p)))
#else
enum { HAS_BF16 = 0 };
#define VF_DOT_BF16_BROADCAST(y, w, p) ((void)(y), (void)(w), (void)(p))
#endif

#ifdef __AVX512F__
enum { MAX_ROWS = 8 };
#define TALL_HEIGHTS(HEIGHT, ...)                                                                  \
    HEIGHT(5, __VA_ARGS__) HEIGHT(6, __VA_ARGS__) HEIGHT(7, __VA_ARGS__) HEIGHT(8, __VA_ARGS__)
#else
enum { MAX_ROWS = 4 };
#define TALL_HEIGHTS(HEIGHT, ...)
#endif
#define HEIGHTS(HEIGHT, ...)                                                                       \
    HEIGHT(1, __VA_ARGS__)                                                                         \
    HEIGHT(2, __VA_ARGS__)                                                                         \
    HEIGHT(3, __VA_ARGS__) HEIGHT(4, __VA_ARGS__) TALL_HEIGHTS(HEIGHT, __VA_ARGS__)

/* What is laid down, in the order of k: codes, four k a dword, LANES dwords for each four; scales
 * and minima, LANES for each `fine` k. Of float formats the dwords as they are. */
typedef struct {
    uint8_t *codes;
    float *scales, *minima;
} laid;

/* A tile of rows on its way along k. Packed side by side: a [k / 4][rows][4] (8 bytes: int16),
 * floats [dword][rows][4] or [k][rows][4]; a_scale [activation groups][rows]; correction [k /
 * fine][rows]: int32 -zero * sum of codes, or, with minima, the sum as float. Float formats: inner
 * and y are the sums over even and odd k. */
typedef struct {
    const uint8_t *a;
    const float *a_scale, *correction;
    int num_rows, left, rest; /* k that are left: of the activation group, and behind it */
    VF inner[MAX_ROWS], y[MAX_ROWS];
} tile;

/* acc[m] += sum of DWORDS * 4 codes times activations. */
INLINE void dot(const int MR, const int DWORDS, const int MOST, const VI *codes, const uint8_t *a,
                VI acc[MAX_ROWS]) {
#define CODES(r) VI_LOAD((const uint8_t *)(codes + (r)))
#ifdef __AVX512VNNI__
    (void)MOST;
    UNROLL
    for (int r = 0; r < DWORDS; r++) {
        VI w = CODES(r);
        UNROLL
        for (int m = 0; m < MR; m++) VI_DOT_BROADCAST(acc[m], w, a + 4 * (MR * r + m));
    }
#else
    if (IS_WIDE(MOST)) { /* activations are int16, k order 0 2 1 3 */
        const VI mask = VI_SET16(255);
        UNROLL
        for (int r = 0; r < DWORDS; r++) {
            VI w = CODES(r);
            VI even = VI_AND(w, mask), odd = VI_SRL16(w, 8);
            UNROLL
            for (int m = 0; m < MR; m++) {
                const uint8_t *four = a + 8 * (MR * r + m);
                acc[m] = VI_ADD32(acc[m], VI_MADD(even, VI_SET32(load32(four))));
                VI_PIN(acc[m]);
                acc[m] = VI_ADD32(acc[m], VI_MADD(odd, VI_SET32(load32(four + 4))));
                VI_PIN(acc[m]);
            }
        }
        return;
    }
    const int SAFE =
        /* sums of pairs that fit int16 */
        32767 / (254 * MOST) < DWORDS ? 32767 / (254 * MOST) : DWORDS;
    const VI ones = VI_SET16(1);
    VI pairs[MAX_ROWS];
    UNROLL
    for (int r = 0; r < DWORDS; r++) {
        VI w = CODES(r);
        UNROLL
        for (int m = 0; m < MR; m++) {
            VI product = VI_MADDUBS(w, VI_SET32(load32(a + 4 * (MR * r + m))));
            pairs[m] = r % SAFE ? VI_ADD16(pairs[m], product) : product;
            VI_PIN(pairs[m]);
            if (r % SAFE == SAFE - 1 || r == DWORDS - 1)
                acc[m] = VI_ADD32(acc[m], VI_MADD(pairs[m], ones));
        }
    }
#endif
#undef CODES
}

/* The next 32 k times MR rows. */
INLINE void accumulate(const int MR, const int FINE, const int HAS_MIN, const int MOST,
                       int activation_group, tile *t, const VI *codes, const VF *scale,
                       const VF *minimum) {
    const int DWORDS = FINE / 4, UNIT = IS_WIDE(MOST) ? 8 : 4;
    UNROLL
    for (int g = 0; g < 32 / FINE; g++) {
        VI acc[MAX_ROWS];
        UNROLL
        for (int m = 0; m < MR; m++)
            acc[m] = HAS_MIN ? VI_ZERO() : VI_SET32(load32((const uint8_t *)(t->correction + m)));
        dot(MR, DWORDS, MOST, codes + g * DWORDS, t->a, acc);
        UNROLL
        for (int m = 0; m < MR; m++) {
            t->inner[m] = VF_FMA(VF_CVT(acc[m]), scale[g], t->inner[m]);
            if (HAS_MIN) t->inner[m] = VF_FMA(VF_SET(t->correction[m]), minimum[g], t->inner[m]);
        }
        t->a += DWORDS * UNIT * MR;
        t->correction += MR;
    }
    t->left -= 32;
    if (t->left == 0) {
        UNROLL
        for (int m = 0; m < MR; m++) {
            t->y[m] = VF_FMA(t->inner[m], VF_SET(t->a_scale[m]), t->y[m]);
            t->inner[m] = VF_ZERO();
        }
        t->a_scale += MR;
        t->left = activation_group < t->rest ? activation_group : t->rest;
        t->rest -= t->left;
    }
}

/* A tile begun, its sums in registers. */
INLINE tile begin(const int MR, const tile *from) {
    tile t = {from->a,    from->a_scale, from->correction, MR,
              from->left, from->rest,    {VF_ZERO()},      {VF_ZERO()}};
    UNROLL
    for (int m = 0; m < MR; m++) {
        t.inner[m] = from->inner[m];
        t.y[m] = from->y[m];
    }
    return t;
}

INLINE void end(const int MR, const tile *t, tile *to) {
    to->a = t->a;
    to->a_scale = t->a_scale;
    to->correction = t->correction;
    to->left = t->left;
    to->rest = t->rest;
    UNROLL
    for (int m = 0; m < MR; m++) {
        to->inner[m] = t->inner[m];
        to->y[m] = t->y[m];
    }
}

/* The next num_k k that were laid down, a multiple of 32, times MR rows. */
INLINE void multiply_integer(const int MR, const int FINE, const int HAS_MIN, const int MOST,
                             const ktk_matrix *w, laid p, int num_k, tile *rows) {
    tile t = begin(MR, rows);
    for (; num_k > 0; num_k -= 32) {
        VF scale[2], minimum[2];
        UNROLL
        for (int g = 0; g < 32 / FINE; g++) {
            scale[g] = VF_LOAD(p.scales + g * LANES);
            minimum[g] = HAS_MIN ? VF_LOAD(p.minima + g * LANES) : VF_ZERO();
        }
        accumulate(MR, FINE, HAS_MIN, MOST, w->activation_group, &t, (const VI *)p.codes, scale,
                   minimum);
        p.codes += 8 * VI_BYTES;
        p.scales += 32 / FINE * LANES;
        p.minima += 32 / FINE * LANES;
    }
    end(MR, &t, rows);
}

/* The same for a float format: num_dwords of them, even. */
INLINE void accumulate_float(const int MR, const int FORMAT, const uint8_t *dwords, int num_dwords,
                             tile *t) {
    const VI high = VI_SET32((int)0xffff0000);
    for (int d = 0; d < num_dwords; d += 2, dwords += 2 * VI_BYTES) UNROLL
    for (int i = 0; i < 2; i++) {
        VI x = VI_LOAD(dwords + i * VI_BYTES);
        const float *a = (const float *)t->a;
        const int is_pair = FORMAT == KTK_BLOCK_f16 || (FORMAT == KTK_BLOCK_bf16 && !HAS_BF16);
        VF even = VF_BITS(x), odd = even;
        if (is_pair) {
            even = FORMAT == KTK_BLOCK_bf16 ? VF_BITS(VI_SLL32(x, 16)) : VF_LOW_HALF(x);
            odd =
                FORMAT == KTK_BLOCK_bf16 ? VF_BITS(VI_AND(x, high)) : VF_LOW_HALF(VI_SRL32(x, 16));
        }
        UNROLL
        for (int m = 0; m < MR; m++) {
            VF *y = i ? &t->y[m] : &t->inner[m];
            if (is_pair) {
                t->inner[m] = VF_FMA(VF_SET(a[m]), even, t->inner[m]);
                t->y[m] = VF_FMA(VF_SET(a[MR + m]), odd, t->y[m]);
            } else if (FORMAT == KTK_BLOCK_bf16) {
                VF_DOT_BF16_BROADCAST(*y, x, a + m);
            } else {
                *y = VF_FMA(VF_SET(a[m]), even, *y);
            }
        }
        t->a += 4 * (is_pair ? 2 : 1) * MR;
    }
}

INLINE void multiply_float(const int MR, const int FORMAT, laid p, int num_k, tile *rows) {
    tile t = begin(MR, rows);
    accumulate_float(MR, FORMAT, p.codes, num_k * TRAITS[FORMAT].float_bytes / 4, &t);
    end(MR, &t, rows);
}

typedef void multiply_fn(const ktk_matrix *w, laid p, int num_k, tile *t);

/* One function for the integer formats of a shape; with VNNI the largest code makes no difference.
 */
#ifdef __AVX512VNNI__
#define SHAPES(SHAPE) SHAPE(32, 0, 255) SHAPE(32, 1, 255) SHAPE(16, 0, 255) SHAPE(16, 1, 255)
#else
#define SHAPES(SHAPE)                                                                              \
    SHAPE(32, 0, 255)                                                                              \
    SHAPE(32, 0, 127)                                                                              \
    SHAPE(32, 0, 31)                                                                               \
    SHAPE(32, 0, 15)                                                                               \
    SHAPE(32, 1, 31)                                                                               \
    SHAPE(32, 1, 15)                                                                               \
    SHAPE(16, 0, 255)                                                                              \
    SHAPE(16, 0, 127) SHAPE(16, 0, 63) SHAPE(16, 0, 31) SHAPE(16, 1, 15)
#endif
#define HEIGHT(MR, FINE, HAS_MIN, MOST)                                                            \
    case MR:                                                                                       \
        multiply_integer(MR, FINE, HAS_MIN, MOST, w, p, num_k, t);                                 \
        break;
#define SHAPE(FINE, HAS_MIN, MOST)                                                                 \
    static void multiply_##FINE##_##HAS_MIN##_##MOST(const ktk_matrix *w, laid p, int num_k,       \
                                                     tile *t) {                                    \
        switch (t->num_rows) { HEIGHTS(HEIGHT, FINE, HAS_MIN, MOST) }                              \
    }
SHAPES(SHAPE)
#undef SHAPE
#undef HEIGHT

#define HEIGHT(MR, FORMAT)                                                                         \
    case MR:                                                                                       \
        multiply_float(MR, FORMAT, p, num_k, t);                                                   \
        break;
#define FLOAT_ROW(NAME, ...)                                                                       \
    static void multiply_##NAME(const ktk_matrix *w, laid p, int num_k, tile *t) {                 \
        (void)w;                                                                                   \
        switch (t->num_rows) { HEIGHTS(HEIGHT, KTK_BLOCK_##NAME) }                                 \
    }
LF_FLOAT_FORMATS(FLOAT_ROW)
#undef FLOAT_ROW
#undef HEIGHT

/* The last shape, the tightest, whose codes reach far enough; every format has one (test.c). */
INLINE multiply_fn *multiply_of(const int FORMAT) {
    const traits *t = &TRAITS[FORMAT];
    multiply_fn *found = NULL;
#define FLOAT_ROW(NAME, ...)                                                                       \
    if (FORMAT == KTK_BLOCK_##NAME) found = multiply_##NAME;
#define SHAPE(FINE, HAS_MIN, MOST)                                                                 \
    if (t->fine == FINE && t->has_min == HAS_MIN && t->most <= MOST &&                             \
        IS_WIDE(t->most) == IS_WIDE(MOST))                                                         \
        found = multiply_##FINE##_##HAS_MIN##_##MOST;
    LF_FLOAT_FORMATS(FLOAT_ROW)
    SHAPES(SHAPE)
#undef SHAPE
#undef FLOAT_ROW
    return found;
}

/* A format without a shape, or whose bytes are not dwords and a head, does not compile. */
#define SHAPE(FINE, HAS_MIN, MOST)                                                                 \
    || (fine == FINE && has_min == HAS_MIN && most <= MOST && IS_WIDE(most) == IS_WIDE(MOST))
#define ROW(NAME, TEXT, TYPE, WEIGHTS, BYTES, RUN, DWORDS, HEAD, HEAD_BYTES, FINE, ZERO, HAS_MIN,  \
            MOST, ROW_HEAD)                                                                        \
    INLINE void check_##NAME(void) {                                                               \
        enum { fine = FINE, has_min = HAS_MIN, most = MOST };                                      \
        _Static_assert(0 SHAPES(SHAPE), "add a shape for " TEXT);                                  \
        _Static_assert(4 * DWORDS + HEAD_BYTES == BYTES && DWORDS >= 4 && DWORDS <= MAX_DWORDS,    \
                       "bytes of " TEXT);                                                          \
    }
LF_INTEGER_FORMATS(ROW)
#undef ROW
#undef SHAPE

#endif
