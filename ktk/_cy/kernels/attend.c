/* Attention of one row over some of its keys: a flash-attention step whose partial results
 * attention.c joins.
 *
 * Keys and values are converted to fp32 a tile at a time, which stays in L1 for all query heads of
 * a key-value head.
 *
 * Symbols: ktk_attend_avx2 ktk_attend_avx512 ktk_attend_avx512vnni. */
#include <math.h>

#include "exp.h"
#include "ktk_kernels.h"
#include "row.h"

/* n rows from `at` on, which lie in one tile, as fp32; *stride: floats from one to the next. */
INLINE const float *rows_of(int dtype, const ktk_tiles *t, int at, int n, float *buffer,
                            int64_t *stride) {
    const int64_t first = at % KTK_ATTEND_TILE * t->row_stride;
    const void *tile = t->tiles[at / KTK_ATTEND_TILE];
    *stride = dtype == KTK_DTYPE_F32 ? t->row_stride : t->dim;
    if (dtype == KTK_DTYPE_F32) return (const float *)tile + first;
    const uint16_t *rows = (const uint16_t *)tile + first;
    const int step = t->row_stride == t->dim ? n : 1; /* rows that lie together */
    for (int k = 0; k < n; k += step)
        CAT(ktk_load_, KTK_ISA)(dtype, rows + k * t->row_stride, (int64_t)step * t->dim,
                                buffer + (int64_t)k * t->dim);
    return buffer;
}

/* Sums of four vectors. */
INLINE __m128 sums_of_four(VF a, VF b, VF c, VF d) {
#ifdef __AVX512F__
#define HALVES(x) _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))
#else
#define HALVES(x) (x)
#endif
    __m256 ab = _mm256_hadd_ps(HALVES(a), HALVES(b)), cd = _mm256_hadd_ps(HALVES(c), HALVES(d));
    __m256 all = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#undef HALVES
}

/* Scores of a tile's n keys with one row of q, added to what is there or not; n is rounded up to
 * four, the last key standing in for those missing. */
INLINE void score_tile(int dim, const float *q, const float *tile, int64_t stride, int n, int adds,
                       float *scores) {
    for (int k = 0; k < n; k += 4) {
        const float *key[4];
        UNROLL
        for (int j = 0; j < 4; j++) key[j] = tile + (k + j < n ? k + j : n - 1) * stride;
        VF acc[4] = {VF_ZERO(), VF_ZERO(), VF_ZERO(), VF_ZERO()};
        for (int i = 0; i < dim; i += LANES) {
            const VF x = VF_LOAD(q + i);
            UNROLL
            for (int j = 0; j < 4; j++) acc[j] = VF_FMA(x, VF_LOAD(key[j] + i), acc[j]);
        }
        __m128 sums = sums_of_four(acc[0], acc[1], acc[2], acc[3]);
        if (adds) sums = _mm_add_ps(_mm_loadu_ps(scores + k), sums);
        _mm_storeu_ps(scores + k, sums);
    }
}

/* Scores to exp(score - largest); returns the largest, and *sum. What is past count up to whole
 * vectors is overwritten. */
INLINE float exponentials(float *scores, int count, float *sum) {
    float most = scores[0];
    for (int k = 1; k < count; k++) most = scores[k] > most ? scores[k] : most;
    for (int k = count; k % LANES; k++) scores[k] = most;
    for (int k = 0; k < count; k += LANES)
        VF_STORE(scores + k, exp_clamped(VF_SUB(VF_LOAD(scores + k), VF_SET(most))));
    *sum = 0.0f;
    for (int k = 0; k < count; k++) *sum += scores[k];
    return most;
}

/* out += sum over a tile's n values, in order, of weight * value; N vectors of it at i. */
INLINE void add_values(const int N, const float *weights, const float *tile, int64_t stride, int n,
                       int i, float *out) {
    VF acc[4];
    UNROLL
    for (int j = 0; j < N; j++) acc[j] = VF_LOAD(out + i + j * LANES);
    for (int k = 0; k < n; k++) {
        const float *value = tile + k * stride + i;
        UNROLL
        for (int j = 0; j < N; j++)
            acc[j] = VF_FMA(VF_SET(weights[k]), VF_LOAD(value + j * LANES), acc[j]);
    }
    UNROLL
    for (int j = 0; j < N; j++) VF_STORE(out + i + j * LANES, acc[j]);
}

/* Keys of a tile from k on: tiles begin where pages may. */
INLINE int keys_of_tile(const ktk_attend *a, int k) {
    const int n = KTK_ATTEND_TILE - (a->first + k) % KTK_ATTEND_TILE;
    return n < a->count - k ? n : a->count - k;
}

INLINE void score_keys(const ktk_attend *a, const ktk_tiles *keys, int from, int adds, float *tile,
                       float *scores) {
    const int width = a->keys.dim + a->more.dim;
    for (int k = 0, n; k < a->count; k += n) {
        n = keys_of_tile(a, k);
        int64_t stride;
        const float *rows = rows_of(a->dtype, keys, a->first + k, n, tile, &stride);
        for (int g = 0; g < a->group; g++)
            score_tile(keys->dim, a->q + (int64_t)g * width + from, rows, stride, n, adds,
                       scores + g * KTK_ATTEND_KEYS + k);
    }
}

void CAT(ktk_attend_, KTK_ISA)(const ktk_attend *a, float *tile, float *out, float *most) {
    const int dim = a->values.dim;
    float *scores = tile + KTK_ATTEND_TILE * ktk_attend_width(a->keys.dim, a->more.dim, dim);
    score_keys(a, &a->keys, 0, 0, tile, scores);
    if (a->more.dim) score_keys(a, &a->more, a->keys.dim, 1, tile, scores);
    for (int g = 0; g < a->group; g++)
        most[2 * g] = exponentials(scores + g * KTK_ATTEND_KEYS, a->count, &most[2 * g + 1]);
    memset(out, 0, 4 * (size_t)a->group * (size_t)dim);
    for (int k = 0, n; k < a->count; k += n) {
        n = keys_of_tile(a, k);
        int64_t stride;
        const float *rows = rows_of(a->dtype, &a->values, a->first + k, n, tile, &stride);
        for (int g = 0; g < a->group; g++) {
            const float *weights = scores + g * KTK_ATTEND_KEYS + k;
            float *sum = out + (int64_t)g * dim;
            int i = 0;
            for (; i + 4 * LANES <= dim; i += 4 * LANES)
                add_values(4, weights, rows, stride, n, i, sum);
            for (; i < dim; i += LANES) add_values(1, weights, rows, stride, n, i, sum);
        }
    }
}
