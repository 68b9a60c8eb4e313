/* From rows to lanes: the bytes of a block of LANES rows, side by side. */
#ifndef LF_GATHER_H
#define LF_GATHER_H

#include <string.h>

#include "traits.h"

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

/* The heads of a strip's rows, words, or bytes in the lower part. */
#ifdef __AVX512F__
typedef __m256i head_words;
#define LOW_128(heads) _mm256_castsi256_si128(heads)
#else
typedef __m128i head_words;
#define LOW_128(heads) (heads)
#endif

/* A block of a strip: dword i of lane n at dwords + 64 * i + 4 * n, or in few[i]. */
typedef struct {
    const uint8_t *dwords;
    const VI *few;
    head_words heads;
    VF row_scale;
} block;

INLINE __m128i load_128(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }

/* The address of row n of a strip, from those of every fourth. */
#define STRIP_ROW(n) (row[(n) / 4] + ((n) % 4 == 3 ? stride_3 : (n) % 4 * stride))

/* QUADS times four dwords of LANES rows, transposed: x[i] holds dword i of all. Rows outside,
 * dwords inside: rows that lie whole pages apart share a cache set, and a line must be used up
 * before the others push it out. */
INLINE void transpose_dwords(const int QUADS, const uint8_t *const row[LANES / 4], int64_t stride,
                             int64_t stride_3, int offset, VI *x) {
    VI r[4][4];
    UNROLL
    for (int i = 0; i < 4; i++) UNROLL
    for (int q = 0; q < QUADS; q++) {
        const int at = offset + 16 * q;
        __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(STRIP_ROW(i) + at)),
                                              load_128(STRIP_ROW(i + 4) + at), 1);
#ifdef __AVX512F__
        __m256i high =
            _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(STRIP_ROW(i + 8) + at)),
                                    load_128(STRIP_ROW(i + 12) + at), 1);
        r[q][i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
        r[q][i] = low;
#endif
    }
    UNROLL
    for (int q = 0; q < QUADS; q++) {
        VI a = VI_UNPACK_LOW32(r[q][0], r[q][1]), b = VI_UNPACK_LOW32(r[q][2], r[q][3]);
        VI c = VI_UNPACK_HIGH32(r[q][0], r[q][1]), d = VI_UNPACK_HIGH32(r[q][2], r[q][3]);
        x[4 * q] = VI_UNPACK_LOW64(a, b);
        x[4 * q + 1] = VI_UNPACK_HIGH64(a, b);
        x[4 * q + 2] = VI_UNPACK_LOW64(c, d);
        x[4 * q + 3] = VI_UNPACK_HIGH64(c, d);
    }
}

/* Built in registers: a wide load of what narrow stores have just written waits until they reach
 * the cache. */
INLINE head_words gather_heads(const int BYTES, const uint8_t *const row[LANES / 4], int64_t stride,
                               int64_t stride_3, int offset) {
    __m128i x[2] = {_mm_setzero_si128(), _mm_setzero_si128()};
#define PUT_WORD(i, n)                                                                             \
    {                                                                                              \
        uint16_t v;                                                                                \
        memcpy(&v, STRIP_ROW(n) + offset, 2);                                                      \
        x[(n) / 8] = _mm_insert_epi16(x[(n) / 8], v, i);                                           \
    }
#define PUT_BYTE(i, n) x[0] = _mm_insert_epi8(x[0], *(STRIP_ROW(n) + offset), n);
#define EIGHT(PUT, n)                                                                              \
    PUT(0, n)                                                                                      \
    PUT(1, n + 1)                                                                                  \
    PUT(2, n + 2) PUT(3, n + 3) PUT(4, n + 4) PUT(5, n + 5) PUT(6, n + 6) PUT(7, n + 7)
    if (BYTES == 2) {
        EIGHT(PUT_WORD, 0)
#ifdef __AVX512F__
        EIGHT(PUT_WORD, 8)
#endif
    } else {
        EIGHT(PUT_BYTE, 0)
#ifdef __AVX512F__
        EIGHT(PUT_BYTE, 8)
#endif
    }
#undef PUT_WORD
#undef PUT_BYTE
#undef EIGHT
#ifdef __AVX512F__
    return _mm256_inserti128_si256(_mm256_castsi128_si256(x[0]), x[1], 1);
#else
    return x[0];
#endif
}

/* The same from memory, where they lie one behind the other. */
INLINE head_words load_heads(const int BYTES, const uint8_t *p) {
#ifdef __AVX512F__
    if (BYTES == 2) return _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi128_si256(load_128(p));
#else
    return BYTES == 2 ? load_128(p) : _mm_loadl_epi64((const __m128i *)p);
#endif
}

INLINE void store_heads(const int BYTES, head_words heads, uint8_t *p) {
    memcpy(p, &heads, (size_t)(BYTES * LANES));
}

enum { FEW_DWORDS = 8 }; /* of a block that stays in registers */

/* Where a block of a strip stands in rows 0, 4, 8, 12, and the distance of rows: six registers
 * address all sixteen. */
typedef struct {
    const uint8_t *row[LANES / 4];
    int64_t stride, stride_3;
} strip_rows;

INLINE strip_rows rows_at(const uint8_t *first, int64_t stride) {
    strip_rows s = {.stride = stride, .stride_3 = 3 * stride};
    UNROLL
    for (int i = 0; i < LANES / 4; i++) s.row[i] = first + 4 * i * stride;
    return s;
}

/* To the next block. GCC would derive every address from the first one anew, and spill: it is not
 * told how they go together. */
INLINE void step_rows(strip_rows *s, int bytes) {
    UNROLL
    for (int i = 0; i < LANES / 4; i++) {
        s->row[i] += bytes;
        __asm__("" : "+r"(s->row[i]));
    }
    __asm__("" : "+r"(s->stride), "+r"(s->stride_3));
}

/* The scales of a strip's rows, BYTES each: 4, fp32, 2, fp16, or none. */
INLINE VF row_scales(const int BYTES, const uint8_t *first, int64_t stride) {
    if (!BYTES) return VF_ZERO();
    float scale[LANES];
    for (int n = 0; n < LANES; n++, first += stride) {
        if (BYTES == 4)
            memcpy(scale + n, first, 4);
        else
            scale[n] = _cvtsh_ss((uint16_t)load16(first));
    }
    return VF_LOAD(scale);
}

/* The next four dwords at least: the last ones of a run overlap. */
#define QUAD_AT(i) (i + 4 <= t->dwords ? i : t->dwords - 4)

/* One block of a strip: its dwords to few where there are few, else to `raw`, whose lane 0 is the
 * strip's, STRIDE bytes apart; gives its heads. */
INLINE head_words gather(const int FORMAT, const int STRIDE, const strip_rows *from, uint8_t *raw,
                         VI *few) {
    const traits *t = &TRAITS[FORMAT];
    const uint8_t *const *row = from->row;
    const int64_t stride = from->stride, stride_3 = from->stride_3;
    if (few) {
        UNROLL
        for (int i = 0; i < t->dwords; i += 4)
            transpose_dwords(1, row, stride, stride_3, t->run + 4 * QUAD_AT(i), few + QUAD_AT(i));
    } else {
        const int lines = t->dwords / 16;
        for (int l = 0; l < lines; l++) {
            VI x[16];
            transpose_dwords(4, row, stride, stride_3, t->run + 64 * l, x);
            UNROLL
            for (int j = 0; j < 16; j++) VI_STORE(raw + STRIDE * (16 * l + j), x[j]);
        }
        UNROLL
        for (int i = 16 * lines; i < t->dwords; i += 4) {
            VI x[4];
            transpose_dwords(1, row, stride, stride_3, t->run + 4 * QUAD_AT(i), x);
            UNROLL
            for (int j = 0; j < 4; j++) VI_STORE(raw + STRIDE * (QUAD_AT(i) + j), x[j]);
        }
    }
    if (!t->head_bytes) return load_heads(2, (const uint8_t *)&(head_words){0});
    return gather_heads(t->head_bytes, row, stride, stride_3, t->head);
}

#endif
