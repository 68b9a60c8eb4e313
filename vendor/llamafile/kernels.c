/* The kernels of one ISA: gather, decode, multiply. Compiled once per ISA row with KTK_ISA its name.
 *
 * A strip is LANES rows of weights, one a lane. For every block: gather its bytes (dwords of all rows side by side),
 * decode them into codes of four k a dword with a scale (and minimum) for every `fine` k, multiply with MR rows:
 *
 *   sum = correction + sum of code * activation                exactly, in int32
 *   inner = fma(sum, scale, inner)                             over an activation group, and, where there are minima,
 *   inner = fma(sum of activations, minimum, inner)
 *   y = fma(inner, activation scale, y)
 *
 * Up to DIRECT_ROWS rows are multiplied with the registers the decoder fills. For more it is run once a panel with MR 0:
 * codes, scales and minima go to `work`, [k / 4][LANES] dwords, and tiles of up to MAX_ROWS rows run over them. The
 * arithmetic above is one function for both. Float formats: one fma (VDPBF16PS) for even and one for odd k (dwords),
 * added at the end.
 *
 * Registers with 512 bits, 8 rows: 8 sums, 8 inner, 8 y, codes, scale, minimum. VPDPBUSD, VPMADDUBSW, VDPBF16PS: Intel
 * SDM vol. 2. */
#include <string.h>

#include "grids.h"
#include "interleave.h"
#include "llamafile.h"
#include "vec.h"

#include "formats.h"

#ifdef __AVX512F__
enum { MAX_ROWS = 8, BEST_ROWS = 8, DIRECT_ROWS = 4 };
#else
enum { MAX_ROWS = 4, BEST_ROWS = 4, DIRECT_ROWS = 2 };
#endif
enum { STRIPS = LF_PANEL / LANES, VI_BYTES = sizeof(VI), MAX_TILES = LF_MAX_ROWS / BEST_ROWS };

#define ROW(NAME, ...) FORMAT_##NAME,
#define FLOAT_ROW(NAME, ...) FORMAT_##NAME,
enum { LF_FLOAT_FORMATS(FLOAT_ROW) LF_INTEGER_FORMATS(ROW) NUM_FORMATS };
#undef ROW
#undef FLOAT_ROW

/* What a format's row says, folded at compile time. Float formats: 32 weights are a block. */
typedef struct {
    int weights, bytes, run, dwords, head, head_bytes, fine, zero, has_min, most, float_bytes;
} traits;
static const traits TRAITS[NUM_FORMATS] = {
#define ROW(NAME, TEXT, TYPE, WEIGHTS, BYTES, RUN, DWORDS, HEAD, HEAD_BYTES, FINE, ZERO, HAS_MIN, MOST)      \
    {WEIGHTS, BYTES, RUN, DWORDS, HEAD, HEAD_BYTES, FINE, ZERO, HAS_MIN, MOST, 0},
#define FLOAT_ROW(NAME, TEXT, TYPE, BYTES, PER_DWORD) {32, 32 * BYTES, 0, 8 * BYTES, 0, 0, 0, 0, 0, 0, BYTES},
    LF_FLOAT_FORMATS(FLOAT_ROW) LF_INTEGER_FORMATS(ROW)
#undef ROW
#undef FLOAT_ROW
};
enum { MAX_DWORDS = 64, RAW_BYTES = MAX_DWORDS * 64 + 64 };
INLINE int raw_bytes(const int FORMAT) { return 64 * TRAITS[FORMAT].dwords + 16 * TRAITS[FORMAT].head_bytes; }

/* How bytes are multiplied: as they are where that is exact, else widened to 16 bits. */
#ifdef __AVX512VNNI__
#define IS_WIDE(MOST) 0
#else
#define IS_WIDE(MOST) ((MOST) > 127)
#endif

/* -- gather ---------------------------------------------------------------------------------------------------- */

/* A block of a strip: dword i of lane n at dwords + 64 * i + 4 * n, head of lane n at head + head_bytes * n. */
typedef struct {
    const uint8_t *dwords, *head;
} block;

INLINE __m128i load_128(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }

/* Four dwords of LANES rows, transposed: x[i] holds dword i of all. */
INLINE void transpose_dwords(const uint8_t *const row[LANES / 4], int64_t stride, int64_t stride_3,
                             int offset, VI x[4]) {
    VI r[4];
    UNROLL
    for (int i = 0; i < 4; i++) {
        const int64_t at = (i == 3 ? stride_3 : i * stride) + offset;
#ifdef __AVX512F__
        VI v = _mm512_castsi128_si512(load_128(row[0] + at));
        v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load_128(row[1] + at));
        v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load_128(row[2] + at));
        r[i] = _mm512_mask_broadcast_i32x4(v, 0xf000, load_128(row[3] + at));
#else
        r[i] =
            _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(row[0] + at)), load_128(row[1] + at), 1);
#endif
    }
#ifdef __AVX512F__
    VI a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
    VI c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    x[0] = _mm512_unpacklo_epi64(a, b);
    x[1] = _mm512_unpackhi_epi64(a, b);
    x[2] = _mm512_unpacklo_epi64(c, d);
    x[3] = _mm512_unpackhi_epi64(c, d);
#else
    VI a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpacklo_epi32(r[2], r[3]);
    VI c = _mm256_unpackhi_epi32(r[0], r[1]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    x[0] = _mm256_unpacklo_epi64(a, b);
    x[1] = _mm256_unpackhi_epi64(a, b);
    x[2] = _mm256_unpacklo_epi64(c, d);
    x[3] = _mm256_unpackhi_epi64(c, d);
#endif
}

/* The heads of LANES rows, one behind the other. */
INLINE void gather_heads(const int BYTES, const uint8_t *const row[LANES / 4], int64_t stride,
                         int64_t stride_3, int offset, uint8_t *out) {
#define HEAD(n) (row[(n) / 4] + ((n) % 4 == 3 ? stride_3 : (n) % 4 * stride) + offset)
    UNROLL
    for (int half = 0; half < LANES / 8; half++) {
        __m128i x = _mm_setzero_si128();
        if (BYTES == 2) {
#define PUT(i)                                                                                               \
    {                                                                                                        \
        uint16_t v;                                                                                          \
        memcpy(&v, HEAD(8 * half + i), 2);                                                                   \
        x = _mm_insert_epi16(x, v, i);                                                                       \
    }
            PUT(0)
            PUT(1) PUT(2) PUT(3) PUT(4) PUT(5) PUT(6) PUT(7)
#undef PUT
                _mm_storeu_si128((__m128i *)(out + 16 * half), x);
        } else {
#define PUT(i) x = _mm_insert_epi8(x, *HEAD(8 * half + i), i);
            PUT(0)
            PUT(1) PUT(2) PUT(3) PUT(4) PUT(5) PUT(6) PUT(7)
#undef PUT
                _mm_storel_epi64((__m128i *)(out + 8 * half), x);
        }
    }
#undef HEAD
}

/* One block of a strip to `raw`, whose lane 0 is the strip's. at: the block in the strip's first row. */
INLINE void gather(const int FORMAT, const uint8_t *at, int64_t row_bytes, uint8_t *raw, uint8_t *head) {
    const traits *t = &TRAITS[FORMAT];
    const uint8_t *row[LANES / 4];
    const int64_t stride_3 = 3 * row_bytes;
    UNROLL
    for (int i = 0; i < LANES / 4; i++) row[i] = at + 4 * i * row_bytes;
    for (int i = 0; i < t->dwords; i += 4) {
        const int dword = i + 4 <= t->dwords ? i : t->dwords - 4; /* the last four overlap */
        VI x[4];
        transpose_dwords(row, row_bytes, stride_3, t->run + 4 * dword, x);
        UNROLL
        for (int j = 0; j < 4; j++) VI_STORE(raw + 64 * (dword + j), x[j]);
    }
    if (t->head_bytes) gather_heads(t->head_bytes, row, row_bytes, stride_3, t->head, head);
}

/* -- multiply -------------------------------------------------------------------------------------------------- */

/* Where what is decoded goes: multiplied with rows of activations (MR > 0), or laid down for a panel (MR == 0). */
typedef struct {
    int k, group_end, in_features, activation_group;
    const uint8_t *a;     /* [k / 4][rows][4] (or 8 bytes: int16); floats [dword][rows][4] or [k][rows][4] */
    const float *a_scale; /* [activation groups][rows] */
    const float
        *correction; /* [k / fine][rows]: int32 -zero * sum of codes, or, with minima, the sum as float */
    VF inner[MAX_ROWS], y[MAX_ROWS];
    VF even[MAX_ROWS], odd[MAX_ROWS];
    uint8_t *codes;
    float *scales, *minima;
} sink;

typedef struct {
    const uint8_t *a;
    const float *a_scale, *correction;
} tile;

INLINE int32_t load32(const uint8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}

INLINE uint32_t load16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

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
        32767 / (254 * MOST) < DWORDS ? 32767 / (254 * MOST) : DWORDS; /* sums of pairs that fit int16 */
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
            if (r % SAFE == SAFE - 1 || r == DWORDS - 1) acc[m] = VI_ADD32(acc[m], VI_MADD(pairs[m], ones));
        }
    }
#endif
#undef CODES
}

/* 32 k times MR rows. */
INLINE void accumulate(const int MR, const int FINE, const int HAS_MIN, const int MOST, sink *s,
                       const VI *codes, const VF *scale, const VF *minimum) {
    const int DWORDS = FINE / 4, UNIT = IS_WIDE(MOST) ? 8 : 4;
    UNROLL
    for (int g = 0; g < 32 / FINE; g++) {
        VI acc[MAX_ROWS];
        UNROLL
        for (int m = 0; m < MR; m++)
            acc[m] = HAS_MIN ? VI_ZERO() : VI_SET32(load32((const uint8_t *)(s->correction + m)));
        dot(MR, DWORDS, MOST, codes + g * DWORDS, s->a, acc);
        UNROLL
        for (int m = 0; m < MR; m++) {
            s->inner[m] = VF_FMA(VF_CVT(acc[m]), scale[g], s->inner[m]);
            if (HAS_MIN) s->inner[m] = VF_FMA(VF_SET(s->correction[m]), minimum[g], s->inner[m]);
        }
        s->a += DWORDS * UNIT * MR;
        s->correction += MR;
    }
    s->k += 32;
    if (s->k == s->group_end) {
        UNROLL
        for (int m = 0; m < MR; m++) {
            s->y[m] = VF_FMA(s->inner[m], VF_SET(s->a_scale[m]), s->y[m]);
            s->inner[m] = VF_ZERO();
        }
        s->a_scale += MR;
        s->group_end += s->activation_group;
        if (s->group_end > s->in_features) s->group_end = s->in_features;
    }
}

/* 32 k that a decoder found. */
INLINE void put_32(const int MR, const int FORMAT, sink *s, const VI *codes, const VF *scale,
                   const VF *minimum) {
    const int FINE = TRAITS[FORMAT].fine, HAS_MIN = TRAITS[FORMAT].has_min;
    if (MR) {
        accumulate(MR, FINE, HAS_MIN, TRAITS[FORMAT].most, s, codes, scale, minimum);
        return;
    }
    UNROLL
    for (int i = 0; i < 8; i++) VI_STORE(s->codes + i * VI_BYTES, codes[i]);
    s->codes += 8 * VI_BYTES;
    UNROLL
    for (int g = 0; g < 32 / FINE; g++) {
        VF_STORE(s->scales + g * LANES, scale[g]);
        if (HAS_MIN) VF_STORE(s->minima + g * LANES, minimum[g]);
    }
    s->scales += 32 / FINE * LANES;
    s->minima += 32 / FINE * LANES;
}

/* `dwords` transposed dwords at `from` times MR rows, float formats. */
INLINE void accumulate_float(const int MR, const int FORMAT, sink *s, const uint8_t *from, int from_stride,
                             int dwords) {
    const VI high = VI_SET32((int)0xffff0000);
    for (int r = 0; r < dwords; r += 2, from += 2 * from_stride) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            VI x = VI_LOAD(from + i * from_stride);
            const float *a = (const float *)s->a;
#ifdef __AVX512BF16__
            if (FORMAT == FORMAT_bf16) {
                UNROLL
                for (int m = 0; m < MR; m++) {
                    VF *y = i ? &s->odd[m] : &s->even[m];
                    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(*y) : "v"(x), "m"(a[m]));
                }
                s->a += 4 * MR;
                continue;
            }
#endif
            if (FORMAT == FORMAT_f32) {
                UNROLL
                for (int m = 0; m < MR; m++) {
                    VF *y = i ? &s->odd[m] : &s->even[m];
                    *y = VF_FMA(VF_SET(a[m]), VF_BITS(x), *y);
                }
                s->a += 4 * MR;
                continue;
            }
            VF even, odd;
            if (FORMAT == FORMAT_bf16) {
                even = VF_BITS(VI_SLL32(x, 16));
                odd = VF_BITS(VI_AND(x, high));
            } else {
                even = VF_LOW_HALF(x);
                odd = VF_LOW_HALF(VI_SRL32(x, 16));
            }
            UNROLL
            for (int m = 0; m < MR; m++) {
                s->even[m] = VF_FMA(VF_SET(a[m]), even, s->even[m]);
                s->odd[m] = VF_FMA(VF_SET(a[MR + m]), odd, s->odd[m]);
            }
            s->a += 8 * MR;
        }
    }
}

/* -- what decoders are made of --------------------------------------------------------------------------------- */

INLINE VI dword(block b, int i) { return VI_LOAD(b.dwords + 64 * i); }
INLINE VF half_head(block b) { return VF_HALF(b.head); }
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
INLINE VF unsigned_byte(VI x, int i) { return VF_CVT(VI_AND(i ? VI_SRL32(x, 8 * i) : x, VI_SET32(255))); }
INLINE VF signed_byte(VI x, int i) { return VF_CVT(VI_SRA32(i == 3 ? x : VI_SLL32(x, 24 - 8 * i), 24)); }
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

/* Entries of 8 bytes at LANES indices, of `bytes` bytes, 4 bytes apart: two dwords a lane. Scalar loads, because a gather of
 * 16 lanes costs more (measured on Zen 4). */
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

/* Indices of more than eight bits, stored as words: at[0] those of bytes 0 and 2 of `bytes`, at[1] of 1 and 3. Where their
 * high bits are, masked by `mask`: one dword for each byte. */
INLINE void word_indices(VI bytes, uint8_t at[][64], VI mask, VI high_0, VI high_2, VI high_1, VI high_3) {
    const VI low = VI_SET32(0x00ff00ff), first = VI_SET32(0x0000ffff);
    VI even = VI_OR(VI_AND(high_0, first), VI_ANDNOT(first, high_2));
    VI odd = VI_OR(VI_AND(high_1, first), VI_ANDNOT(first, high_3));
    VI_STORE(at[0], VI_OR(VI_AND(bytes, low), VI_AND(even, mask)));
    VI_STORE(at[1], VI_OR(VI_AND(VI_SRL16(bytes, 8), low), VI_AND(odd, mask)));
}

/* Bit 7 of each byte becomes the parity of the other seven: an even number of signs. */
INLINE VI with_parity(VI x) {
    static const uint8_t PARITY[16] = {0, 128, 128, 0, 128, 0, 0, 128, 128, 0, 0, 128, 0, 128, 128, 0};
    const VI table = VI_LOAD_TABLE(PARITY), mask = VI_SET8(15);
    VI parity = VI_XOR(VI_SHUFFLE8(table, VI_AND(x, mask)), VI_SHUFFLE8(table, VI_AND(VI_SRL16(x, 4), mask)));
    return VI_OR(x, parity);
}

/* Four times seven bits of sign from a dword's lowest, a byte each. */
INLINE VI seven_bit_signs(VI x) {
    VI a = VI_AND(x, VI_SET32(0x7f)), b = VI_AND(VI_SLL32(x, 1), VI_SET32(0x7f00));
    VI c = VI_AND(VI_SLL32(x, 2), VI_SET32(0x7f0000)), d = VI_AND(VI_SLL32(x, 3), VI_SET32(0x7f000000));
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
        codes[i] = VI_WHERE_BIT(byte_everywhere(signs, i / 2), nibble_bits(i % 2), negated, codes[i]);
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

/* -- one panel ------------------------------------------------------------------------------------------------- */

INLINE void decode(const int FORMAT, const int MR, block b, sink *s) {
    switch (FORMAT) {
#define ROW(NAME, ...)                                                                                       \
    case FORMAT_##NAME:                                                                                      \
        decode_##NAME(MR, b, s);                                                                             \
        break;
        LF_INTEGER_FORMATS(ROW)
#undef ROW
    }
}

/* All blocks of a strip through the decoder; MR as in sink. ahead: as many bytes to fetch meanwhile, or NULL. */
INLINE void run_strip(const int FORMAT, const int MR, const lf_matrix *w, const uint8_t *panel, int strip,
                      const uint8_t *ahead, sink *s) {
    const traits *t = &TRAITS[FORMAT];
    const int64_t row_bytes = (int64_t)w->in_features / t->weights * t->bytes;
    const int num_blocks = w->in_features / t->weights;
    uint8_t buffer[RAW_BYTES + 64] __attribute__((aligned(64)));
    const uint8_t *at = panel + (w->is_repacked ? 0 : strip * LANES * row_bytes);
    const int step = w->is_repacked ? raw_bytes(FORMAT) : t->bytes;
    for (int b = 0; b < num_blocks; b++, at += step) {
        const uint8_t *raw = buffer;
        if (ahead) {
            UNROLL
            for (int i = 0; i < LANES * t->bytes; i += 64)
                _mm_prefetch((const char *)ahead + (int64_t)b * LANES * t->bytes + i, _MM_HINT_T1);
        }
        if (w->is_repacked)
            raw = at;
        else
            gather(FORMAT, at, row_bytes, buffer, buffer + 64 * t->dwords);
        const int lane = w->is_repacked ? strip * LANES : 0;
        const block here = {raw + 4 * lane, raw + 64 * t->dwords + t->head_bytes * lane};
        if (t->float_bytes && MR)
            accumulate_float(MR, FORMAT, s, here.dwords, 64, t->dwords);
        else if (t->float_bytes)
            for (int i = 0; i < t->dwords; i++, s->codes += VI_BYTES) VI_STORE(s->codes, dword(here, i));
        else
            decode(FORMAT, MR, here, s);
    }
}

INLINE void begin(const int MR, const lf_matrix *w, const tile *rows, sink *s) {
    s->k = 0;
    s->in_features = w->in_features;
    s->activation_group = w->activation_group;
    s->group_end = w->activation_group < w->in_features ? w->activation_group : w->in_features;
    s->a = rows->a;
    s->a_scale = rows->a_scale;
    s->correction = rows->correction;
    UNROLL
    for (int m = 0; m < MR; m++) s->inner[m] = s->y[m] = s->even[m] = s->odd[m] = VF_ZERO();
}

INLINE void finish(const int MR, const int FORMAT, sink *s, float *out, int64_t out_stride) {
    UNROLL
    for (int m = 0; m < MR; m++)
        VF_STORE(out + m * out_stride, TRAITS[FORMAT].float_bytes ? VF_ADD(s->even[m], s->odd[m]) : s->y[m]);
}

/* MR rows straight from the blocks. */
INLINE void direct(const int FORMAT, const int MR, const lf_matrix *w, const uint8_t *panel,
                   const uint8_t *ahead, const tile *rows, float *out, int64_t out_stride) {
    for (int strip = 0; strip < STRIPS; strip++) {
        sink s;
        begin(MR, w, rows, &s);
        const int64_t strip_bytes = lf_panel_bytes(w) / STRIPS;
        run_strip(FORMAT, MR, w, panel, strip, ahead ? ahead + strip * strip_bytes : NULL, &s);
        finish(MR, FORMAT, &s, out + strip * LANES, out_stride);
    }
}

/* A strip as it is laid down. */
typedef struct {
    uint8_t *codes;
    float *scales, *minima;
} laid;

INLINE laid laid_at(const int FORMAT, const lf_matrix *w, uint8_t *at) {
    const int K = w->in_features, fine = TRAITS[FORMAT].fine;
    if (!fine) return (laid){at, NULL, NULL};
    float *scales = (float *)(at + (int64_t)K * LANES);
    return (laid){at, scales, scales + (int64_t)K / fine * LANES};
}

INLINE void lay_down(const int FORMAT, const lf_matrix *w, const uint8_t *panel, int strip,
                     const uint8_t *ahead, const laid *p) {
    sink s = {.codes = p->codes, .scales = p->scales, .minima = p->minima};
    const int64_t strip_bytes = lf_panel_bytes(w) / STRIPS;
    run_strip(FORMAT, 0, w, panel, strip, ahead ? ahead + strip * strip_bytes : NULL, &s);
}

INLINE void repack(const int FORMAT, const lf_matrix *w, const uint8_t *panel, uint8_t *out) {
    const traits *t = &TRAITS[FORMAT];
    const int num_blocks = w->in_features / t->weights;
    const int64_t row_bytes = (int64_t)num_blocks * t->bytes;
    for (int b = 0; b < num_blocks; b++, out += raw_bytes(FORMAT))
        for (int strip = 0; strip < STRIPS; strip++) {
            uint8_t *head = out + 64 * t->dwords + t->head_bytes * LANES * strip;
            gather(FORMAT, panel + strip * LANES * row_bytes + b * t->bytes, row_bytes,
                   out + strip * VI_BYTES, head);
        }
}

/* MR rows times a strip that was laid down: integer formats differ in these three only. */
INLINE void tile_integer(const int MR, const int FINE, const int HAS_MIN, const int MOST, const lf_matrix *w,
                         const laid *p, const tile *rows, float *out, int64_t out_stride) {
    sink s;
    begin(MR, w, rows, &s);
    const uint8_t *codes = p->codes;
    const float *scales = p->scales, *minima = p->minima;
    for (int k = 0; k < w->in_features; k += 32) {
        VF scale[2], minimum[2];
        UNROLL
        for (int g = 0; g < 32 / FINE; g++) {
            scale[g] = VF_LOAD(scales + g * LANES);
            minimum[g] = HAS_MIN ? VF_LOAD(minima + g * LANES) : VF_ZERO();
        }
        accumulate(MR, FINE, HAS_MIN, MOST, &s, (const VI *)codes, scale, minimum);
        codes += 8 * VI_BYTES;
        scales += 32 / FINE * LANES;
        minima += 32 / FINE * LANES;
    }
    UNROLL
    for (int m = 0; m < MR; m++) VF_STORE(out + m * out_stride, s.y[m]);
}

INLINE void tile_float(const int FORMAT, const int MR, const lf_matrix *w, const laid *p, const tile *rows,
                       float *out, int64_t out_stride) {
    sink s;
    begin(MR, w, rows, &s);
    accumulate_float(MR, FORMAT, &s, p->codes, VI_BYTES, w->in_features / 4 * TRAITS[FORMAT].float_bytes);
    finish(MR, FORMAT, &s, out, out_stride);
}

#define HEIGHTS_4(TILE) TILE(1) TILE(2) TILE(3) TILE(4)
#ifdef __AVX512F__
#define HEIGHTS(TILE) HEIGHTS_4(TILE) TILE(5) TILE(6) TILE(7) TILE(8)
#define DIRECT_HEIGHTS(TILE) HEIGHTS_4(TILE)
#else
#define HEIGHTS(TILE) HEIGHTS_4(TILE)
#define DIRECT_HEIGHTS(TILE) TILE(1) TILE(2)
#endif

typedef void tile_fn(int num_rows, const lf_matrix *w, const laid *p, const tile *rows, float *out,
                     int64_t out_stride);

/* Tiles of the integer formats; with VNNI the largest code makes no difference. */
#define TILES(FINE, HAS_MIN, MOST)                                                                           \
    static void tiles_##FINE##_##HAS_MIN##_##MOST(int num_rows, const lf_matrix *w, const laid *p,           \
                                                  const tile *rows, float *out, int64_t out_stride) {        \
        switch (num_rows) { HEIGHTS_OF_##FINE##_##HAS_MIN(MOST) }                                            \
    }
#define CASE(MR, FINE, HAS_MIN, MOST)                                                                        \
    case MR:                                                                                                 \
        tile_integer(MR, FINE, HAS_MIN, MOST, w, p, rows, out, out_stride);                                  \
        break;
#ifdef __AVX512VNNI__
#define SHAPES(SHAPE) SHAPE(32, 0, 255) SHAPE(32, 1, 255) SHAPE(16, 0, 255) SHAPE(16, 1, 255)
enum { SAME = 1 };
#else
#define SHAPES(SHAPE)                                                                                        \
    SHAPE(32, 0, 255)                                                                                        \
    SHAPE(32, 0, 127)                                                                                        \
    SHAPE(32, 0, 31)                                                                                         \
    SHAPE(32, 0, 15)                                                                                         \
    SHAPE(32, 1, 31)                                                                                         \
    SHAPE(32, 1, 15)                                                                                         \
    SHAPE(16, 0, 127)                                                                                        \
    SHAPE(16, 0, 63)                                                                                         \
    SHAPE(16, 0, 31)                                                                                         \
    SHAPE(16, 1, 15)
enum { SAME = 0 };
#endif
#define SHAPE(FINE, HAS_MIN, MOST)                                                                           \
    static void tiles_##FINE##_##HAS_MIN##_##MOST(int num_rows, const lf_matrix *w, const laid *p,           \
                                                  const tile *rows, float *out, int64_t out_stride) {        \
        switch (num_rows) {                                                                                  \
            CASE(1, FINE, HAS_MIN, MOST)                                                                     \
            CASE(2, FINE, HAS_MIN, MOST)                                                                     \
            CASE(3, FINE, HAS_MIN, MOST)                                                                     \
            CASE(4, FINE, HAS_MIN, MOST)                                                                     \
            TALL_CASES(FINE, HAS_MIN, MOST)                                                                  \
        }                                                                                                    \
    }
#ifdef __AVX512F__
#define TALL_CASES(FINE, HAS_MIN, MOST)                                                                      \
    CASE(5, FINE, HAS_MIN, MOST)                                                                             \
    CASE(6, FINE, HAS_MIN, MOST) CASE(7, FINE, HAS_MIN, MOST) CASE(8, FINE, HAS_MIN, MOST)
#else
#define TALL_CASES(FINE, HAS_MIN, MOST)
#endif
#undef TILES
SHAPES(SHAPE)
#undef SHAPE

/* The last shape whose codes reach far enough; every format has one. */
INLINE tile_fn *integer_tiles(const int FORMAT) {
    const traits *t = &TRAITS[FORMAT];
#define SHAPE(FINE, HAS_MIN, MOST)                                                                           \
    if (t->fine == FINE && t->has_min == HAS_MIN && t->most <= MOST &&                                       \
        (SAME || IS_WIDE(t->most) == IS_WIDE(MOST)))                                                         \
        found = tiles_##FINE##_##HAS_MIN##_##MOST;
    tile_fn *found = NULL;
    SHAPES(SHAPE)
#undef SHAPE
    return found;
}

#define SHAPE(FINE, HAS_MIN, MOST)                                                                           \
    || (fine == FINE && has_min == HAS_MIN && most <= MOST && (SAME || IS_WIDE(most) == IS_WIDE(MOST)))
#define ROW(NAME, TEXT, TYPE, WEIGHTS, BYTES, RUN, DWORDS, HEAD, HEAD_BYTES, FINE, ZERO, HAS_MIN, MOST)      \
    INLINE void check_##NAME(void) {                                                                         \
        enum { fine = FINE, has_min = HAS_MIN, most = MOST };                                                \
        _Static_assert(0 SHAPES(SHAPE), "add a shape for " TEXT);                                            \
        _Static_assert(4 * DWORDS + HEAD_BYTES == BYTES && DWORDS >= 4 && DWORDS <= MAX_DWORDS,              \
                       "bytes of " TEXT);                                                                    \
    }
LF_INTEGER_FORMATS(ROW)
#undef ROW
#undef SHAPE

/* -- rows of activations --------------------------------------------------------------------------------------- */

INLINE int dwords_of_row(const int FORMAT, const lf_matrix *w) { /* units of four bytes */
    const traits *t = &TRAITS[FORMAT];
#ifdef __AVX512BF16__
    if (FORMAT == FORMAT_bf16) return w->in_features / 2;
#endif
    return t->float_bytes ? w->in_features : w->in_features / 4;
}

INLINE uint8_t *align_64(uint8_t *p) { return (uint8_t *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

/* Rows index[0 .. num_rows) side by side, at work; returns the end of what it wrote. */
INLINE uint8_t *pack_tile(const int FORMAT, const lf_matrix *w, const lf_rows *a, const int32_t *index,
                          int num_rows, uint8_t *work, tile *t) {
    const traits *f = &TRAITS[FORMAT];
    const int units = dwords_of_row(FORMAT, w);
    t->a = work;
    if (IS_WIDE(f->most)) { /* int16, each four k in the order 0 2 1 3 */
        for (int m = 0; m < num_rows; m++) {
            const int8_t *from = (const int8_t *)a->codes + index[m] * a->code_stride;
            int16_t *to = (int16_t *)work + 4 * m;
            for (int k = 0; k < units; k++, from += 4, to += 4 * num_rows) {
                to[0] = from[0];
                to[1] = from[2];
                to[2] = from[1];
                to[3] = from[3];
            }
        }
        work += (int64_t)units * 8 * num_rows;
    } else if (num_rows == 1) {
        t->a = a->codes + index[0] * a->code_stride;
    } else {
        interleave(a->codes, a->code_stride, index, num_rows, units, work);
        work += (int64_t)units * 4 * num_rows;
    }
    work = align_64(work);
    if (f->float_bytes) return work + 64; /* interleave writes a little past its end */
    const int groups = (w->in_features + w->activation_group - 1) / w->activation_group,
              fines = w->in_features / f->fine;
    float *scales = (float *)work, *correction = scales + (int64_t)groups * num_rows;
    t->a_scale = scales;
    t->correction = correction;
    for (int m = 0; m < num_rows; m++) {
        const float *from = a->scales + index[m] * a->scale_stride;
        const int32_t *sums = a->sums + index[m] * a->sum_stride;
        for (int g = 0; g < groups; g++) scales[g * num_rows + m] = from[g];
        for (int g = 0; g < fines; g++) {
            int32_t sum = f->fine == 16 ? sums[g] : sums[2 * g] + sums[2 * g + 1];
            float value = (float)sum;
            sum *= -f->zero;
            memcpy(correction + g * num_rows + m, f->has_min ? (const void *)&value : (const void *)&sum, 4);
        }
    }
    return align_64((uint8_t *)(correction + (int64_t)fines * num_rows) + 64);
}

/* -- the kernels ----------------------------------------------------------------------------------------------- */

INLINE void gemm(const int FORMAT, const lf_matrix *w, const uint8_t *panels, int num_panels,
                 const lf_rows *a, const int32_t *rows, int num_rows, float *out, int64_t out_stride,
                 const uint8_t *next, uint8_t *work, tile_fn *tiles) {
    const int64_t panel_bytes = lf_panel_bytes(w);
    const int is_direct = num_rows <= DIRECT_ROWS;
    const int num_tiles = is_direct ? 1 : (num_rows + BEST_ROWS - 1) / BEST_ROWS; /* of nearly equal height */
    const laid p = laid_at(FORMAT, w, work);
    tile tile_rows[MAX_TILES];
    work += lf_work_bytes(w, 0);
    for (int t = 0; t < num_tiles; t++) {
        int first = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
        work = pack_tile(FORMAT, w, a, rows + first, end - first, work, &tile_rows[t]);
    }
    for (int i = 0; i < num_panels; i++, panels += panel_bytes, out += LF_PANEL) {
        const uint8_t *ahead = i + 1 < num_panels ? panels + panel_bytes : next;
        if (is_direct) {
            switch (num_rows) {
#define TILE(MR)                                                                                             \
    case MR:                                                                                                 \
        direct(FORMAT, MR, w, panels, ahead, &tile_rows[0], out, out_stride);                                \
        break;
                DIRECT_HEIGHTS(TILE)
#undef TILE
            }
            continue;
        }
        for (int strip = 0; strip < STRIPS; strip++) {
            lay_down(FORMAT, w, panels, strip, ahead, &p);
            for (int t = 0; t < num_tiles; t++) {
                int first = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
                tiles(end - first, w, &p, &tile_rows[t], out + first * out_stride + strip * LANES,
                      out_stride);
            }
        }
    }
}

typedef void gemm_fn(const lf_matrix *w, const uint8_t *panels, int num_panels, const lf_rows *a,
                     const int32_t *rows, int num_rows, float *out, int64_t out_stride, const uint8_t *next,
                     uint8_t *work);
typedef void strip_fn(const lf_matrix *w, const uint8_t *panel, int strip, const laid *p);
typedef void repack_fn(const lf_matrix *w, const uint8_t *panel, uint8_t *out);

#define GEMM(NAME, FORMAT, TILES)                                                                            \
    static void gemm_##NAME(const lf_matrix *w, const uint8_t *panels, int num_panels, const lf_rows *a,     \
                            const int32_t *rows, int num_rows, float *out, int64_t out_stride,               \
                            const uint8_t *next, uint8_t *work) {                                            \
        gemm(FORMAT, w, panels, num_panels, a, rows, num_rows, out, out_stride, next, work, TILES);          \
    }                                                                                                        \
    static void strip_##NAME(const lf_matrix *w, const uint8_t *panel, int strip, const laid *p) {           \
        lay_down(FORMAT, w, panel, strip, NULL, p);                                                          \
    }                                                                                                        \
    static void repack_##NAME(const lf_matrix *w, const uint8_t *panel, uint8_t *out) {                      \
        repack(FORMAT, w, panel, out);                                                                       \
    }
#define FLOAT_CASE(MR, FORMAT)                                                                               \
    case MR:                                                                                                 \
        tile_float(FORMAT, MR, w, p, rows, out, out_stride);                                                 \
        break;
#ifdef __AVX512F__
#define TALL_FLOAT_CASES(FORMAT)                                                                             \
    FLOAT_CASE(5, FORMAT) FLOAT_CASE(6, FORMAT) FLOAT_CASE(7, FORMAT) FLOAT_CASE(8, FORMAT)
#else
#define TALL_FLOAT_CASES(FORMAT)
#endif
#define FLOAT_ROW(NAME, ...)                                                                                 \
    static void tiles_##NAME(int num_rows, const lf_matrix *w, const laid *p, const tile *rows, float *out,  \
                             int64_t out_stride) {                                                           \
        switch (num_rows) {                                                                                  \
            FLOAT_CASE(1, FORMAT_##NAME)                                                                     \
            FLOAT_CASE(2, FORMAT_##NAME)                                                                     \
            FLOAT_CASE(3, FORMAT_##NAME)                                                                     \
            FLOAT_CASE(4, FORMAT_##NAME)                                                                     \
            TALL_FLOAT_CASES(FORMAT_##NAME)                                                                  \
        }                                                                                                    \
    }                                                                                                        \
    GEMM(NAME, FORMAT_##NAME, tiles_##NAME)
#define ROW(NAME, ...) GEMM(NAME, FORMAT_##NAME, integer_tiles(FORMAT_##NAME))
LF_FLOAT_FORMATS(FLOAT_ROW)
LF_INTEGER_FORMATS(ROW)
#undef ROW
#undef FLOAT_ROW

#define ROW(NAME, ...) gemm_##NAME,
static gemm_fn *const GEMMS[] = {LF_FLOAT_FORMATS(ROW) LF_INTEGER_FORMATS(ROW)};
#undef ROW
#define ROW(NAME, ...) strip_##NAME,
static strip_fn *const LAY_DOWN[] = {LF_FLOAT_FORMATS(ROW) LF_INTEGER_FORMATS(ROW)};
#undef ROW
#define ROW(NAME, ...) repack_##NAME,
static repack_fn *const REPACK[] = {LF_FLOAT_FORMATS(ROW) LF_INTEGER_FORMATS(ROW)};
#undef ROW

static void gemm_any(const lf_matrix *w, const uint8_t *panels, int num_panels, const lf_rows *a,
                     const int32_t *rows, int num_rows, float *out, int64_t out_stride, const uint8_t *next,
                     uint8_t *work) {
    GEMMS[w->format](w, panels, num_panels, a, rows, num_rows, out, out_stride, next, work);
}

static void repack_any(const lf_matrix *w, const uint8_t *panel, uint8_t *out) {
    REPACK[w->format](w, panel, out);
}

static float float_of(const uint8_t *p, int format, int i) {
    if (format == FORMAT_f32) {
        float v;
        memcpy(&v, p + 4 * i, 4);
        return v;
    }
    uint16_t half;
    memcpy(&half, p + 2 * i, 2);
    if (format == FORMAT_f16) return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static void unpack_any(const lf_matrix *w, const uint8_t *panel, float *codes, float *scales, float *minima,
                       uint8_t *work) {
    const traits *t = &TRAITS[w->format];
    const int K = w->in_features;
    for (int strip = 0; strip < STRIPS; strip++) {
        const laid p = laid_at(w->format, w, work);
        LAY_DOWN[w->format](w, panel, strip, &p);
        const int per_dword = t->float_bytes ? 4 / t->float_bytes : 4;
        for (int k = 0; k < K; k++)
            for (int n = 0; n < LANES; n++) {
                const uint8_t *at = p.codes + (int64_t)(k / per_dword) * VI_BYTES + 4 * n;
                float *to = codes + (int64_t)k * LF_PANEL + strip * LANES + n;
                *to = t->float_bytes ? float_of(at, w->format, k % per_dword) : (float)(at[k % 4] - t->zero);
            }
        if (t->float_bytes) continue;
        for (int g = 0; g < K / t->fine; g++)
            for (int n = 0; n < LANES; n++) {
                scales[g * LF_PANEL + strip * LANES + n] = p.scales[g * LANES + n];
                minima[g * LF_PANEL + strip * LANES + n] = t->has_min ? p.minima[g * LANES + n] : 0.0f;
            }
    }
}

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
const lf_kernels CAT(lf_kernels_, KTK_ISA) = {
    .name = TEXT(KTK_ISA),
#ifdef __AVX512BF16__
    .bf16_codes = LF_CODES_BF16,
#else
    .bf16_codes = LF_CODES_F32,
#endif
    .gemm = gemm_any,
    .repack = repack_any,
    .unpack = unpack_any,
};
