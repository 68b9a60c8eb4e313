/* Rows of activations side by side, as tiles of several rows read them. */
#ifndef KTK_INTERLEAVE_H
#define KTK_INTERLEAVE_H

#include "vec.h"

/* out[k][m] = in[m][k], units of four bytes; in: row m at in + index[m] * stride. Four rows by four
 * units at a time, the last rows first: what is too much in them is then written over. Up to 12 *
 * num_rows + 12 bytes past the end are touched. */
INLINE void interleave(const uint8_t *in, int64_t stride, const int32_t *index, int num_rows,
                       int num_units, uint8_t *out) {
    for (int m = (num_rows - 1) / 4 * 4; m >= 0; m -= 4) {
        const uint8_t *r[4];
        for (int i = 0; i < 4; i++) r[i] = in + index[m + i < num_rows ? m + i : m] * stride;
        for (int k = 0; k < num_units; k += 4) {
            __m128i x[4];
            for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)(r[i] + 4 * k));
            __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpacklo_epi32(x[2], x[3]);
            __m128i c = _mm_unpackhi_epi32(x[0], x[1]), d = _mm_unpackhi_epi32(x[2], x[3]);
            uint8_t *at = out + 4 * ((int64_t)k * num_rows + m);
            _mm_storeu_si128((__m128i *)at, _mm_unpacklo_epi64(a, b));
            _mm_storeu_si128((__m128i *)(at + 4 * num_rows), _mm_unpackhi_epi64(a, b));
            _mm_storeu_si128((__m128i *)(at + 8 * num_rows), _mm_unpacklo_epi64(c, d));
            _mm_storeu_si128((__m128i *)(at + 12 * num_rows), _mm_unpackhi_epi64(c, d));
        }
    }
}

#endif
