/* Attention of one new token over some of its keys: a flash-attention step whose partial results decoder.c joins.
 *
 * Keys and values are converted to fp32 a tile at a time, which stays in L1 for all query rows of a key-value head.
 *
 * Symbols: ktk_attend_avx2 ktk_attend_avx512 ktk_attend_avx512vnni. */
#include <math.h>

#include "exp.h"
#include "ktk_kernels.h"
#include "row.h"

/* Rows [first, first + n) of keys or values, as fp32. */
INLINE const float *tile_of(int dtype, const void *rows, int first, int n, int head_dim, float *tile) {
    const int64_t at = (int64_t)first * head_dim;
    if (dtype == KTK_DTYPE_F32) return (const float *)rows + at;
    CAT(ktk_load_, KTK_ISA)(dtype, (const uint16_t *)rows + at, (int64_t)n * head_dim, tile);
    return tile;
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

/* Scores of a tile's n keys with one row of q; n is rounded up to four, the last key standing in for those missing. */
INLINE void score_tile(int head_dim, const float *q, const float *tile, int n, float *scores) {
    for (int k = 0; k < n; k += 4) {
        const float *key[4];
        UNROLL
        for (int j = 0; j < 4; j++) key[j] = tile + (int64_t)(k + j < n ? k + j : n - 1) * head_dim;
        VF acc[4] = {VF_ZERO(), VF_ZERO(), VF_ZERO(), VF_ZERO()};
        for (int i = 0; i < head_dim; i += LANES) {
            const VF x = VF_LOAD(q + i);
            UNROLL
            for (int j = 0; j < 4; j++) acc[j] = VF_FMA(x, VF_LOAD(key[j] + i), acc[j]);
        }
        _mm_storeu_ps(scores + k, sums_of_four(acc[0], acc[1], acc[2], acc[3]));
    }
}

/* Scores to exp(score - largest); returns the largest, and *sum. What is past count up to whole vectors is overwritten. */
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
INLINE void add_values(const int N, int head_dim, const float *weights, const float *tile, int n, int i,
                       float *out) {
    VF acc[4];
    UNROLL
    for (int j = 0; j < N; j++) acc[j] = VF_LOAD(out + i + j * LANES);
    for (int k = 0; k < n; k++) {
        const float *value = tile + (int64_t)k * head_dim + i;
        UNROLL
        for (int j = 0; j < N; j++) acc[j] = VF_FMA(VF_SET(weights[k]), VF_LOAD(value + j * LANES), acc[j]);
    }
    UNROLL
    for (int j = 0; j < N; j++) VF_STORE(out + i + j * LANES, acc[j]);
}

void CAT(ktk_attend_, KTK_ISA)(int dtype, int head_dim, int group, const float *q, const void *keys,
                               const void *values, int count, float *work, float *out, float *most) {
    float *tile = work, *scores = work + KTK_ATTEND_TILE * head_dim;
    for (int k = 0; k < count; k += KTK_ATTEND_TILE) {
        const int n = count - k < KTK_ATTEND_TILE ? count - k : KTK_ATTEND_TILE;
        const float *rows = tile_of(dtype, keys, k, n, head_dim, tile);
        for (int g = 0; g < group; g++)
            score_tile(head_dim, q + (int64_t)g * head_dim, rows, n, scores + g * KTK_ATTEND_KEYS + k);
    }
    for (int g = 0; g < group; g++)
        most[2 * g] = exponentials(scores + g * KTK_ATTEND_KEYS, count, &most[2 * g + 1]);
    memset(out, 0, 4 * (size_t)group * (size_t)head_dim);
    for (int k = 0; k < count; k += KTK_ATTEND_TILE) {
        const int n = count - k < KTK_ATTEND_TILE ? count - k : KTK_ATTEND_TILE;
        const float *rows = tile_of(dtype, values, k, n, head_dim, tile);
        for (int g = 0; g < group; g++) {
            const float *weights = scores + g * KTK_ATTEND_KEYS + k;
            float *sum = out + (int64_t)g * head_dim;
            int i = 0;
            for (; i + 4 * LANES <= head_dim; i += 4 * LANES)
                add_values(4, head_dim, weights, rows, n, i, sum);
            for (; i < head_dim; i += LANES) add_values(1, head_dim, weights, rows, n, i, sum);
        }
    }
}
