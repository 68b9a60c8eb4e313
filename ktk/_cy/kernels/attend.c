/* Attention of some queries over a chunk of their keys: a flash-attention step whose partial
 * results attention.c joins.
 *
 * Keys and values are converted to fp32 a tile at a time, which stays in L1 for all queries, heads
 * of a key-value head and tokens that follow each other. Two queries share each vector that is
 * loaded of it. With one query and a vector of sums a key, loads and not FMAs were the limit.
 *
 * Symbols: ktk_attend_avx2 ktk_attend_avx512 ktk_attend_avx512vnni. */
#include <math.h>
#include <string.h>

#include "exp.h"
#include "ktk_kernels.h"
#include "row.h"

/* A row of codes, its scale behind it. */
INLINE void widen_codes(const uint8_t *row, int dim, float *out) {
    float scale;
    memcpy(&scale, row + dim, KTK_ROW_SCALE);
    for (int i = 0; i < dim; i += LANES)
        VF_STORE(out + i, VF_MUL(VF_CVT(VI_I8(row + i)), VF_SET(scale)));
}

/* The first n rows of the tile that begins at token `first`, as fp32; *stride: floats from one to
 * the next. */
INLINE const float *rows_of(int dtype, const ktk_tiles *t, int first, int n, float *buffer,
                            int64_t *stride) {
    const void *tile = t->tiles[first / KTK_ATTEND_TILE];
    *stride = dtype == KTK_DTYPE_F32 ? t->row_stride : t->dim;
    if (dtype == KTK_DTYPE_F32) return tile;
    if (dtype == KTK_DTYPE_I8) {
        for (int k = 0; k < n; k++)
            widen_codes((const uint8_t *)tile + k * t->row_stride, t->dim,
                        buffer + (int64_t)k * t->dim);
        return buffer;
    }
    const uint16_t *rows = tile;
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

/* Scores of a tile's n keys with N queries, added to what is there or not; n is rounded up to four,
 * the last key standing in for those missing. */
INLINE void score_tile(const int N, int dim, const float *const *q, const float *tile,
                       int64_t stride, int n, int adds, float *const *scores) {
    for (int k = 0; k < n; k += 4) {
        const float *key[4];
        UNROLL
        for (int j = 0; j < 4; j++) key[j] = tile + (k + j < n ? k + j : n - 1) * stride;
        VF acc[2][4];
        UNROLL
        for (int p = 0; p < N; p++) {
            UNROLL
            for (int j = 0; j < 4; j++) acc[p][j] = VF_ZERO();
        }
        for (int i = 0; i < dim; i += LANES) {
            VF x[2];
            UNROLL
            for (int p = 0; p < N; p++) x[p] = VF_LOAD(q[p] + i);
            UNROLL
            for (int j = 0; j < 4; j++) {
                const VF y = VF_LOAD(key[j] + i);
                UNROLL
                for (int p = 0; p < N; p++) acc[p][j] = VF_FMA(x[p], y, acc[p][j]);
            }
        }
        UNROLL
        for (int p = 0; p < N; p++) {
            __m128 sums = sums_of_four(acc[p][0], acc[p][1], acc[p][2], acc[p][3]);
            if (adds) sums = _mm_add_ps(_mm_loadu_ps(scores[p] + k), sums);
            _mm_storeu_ps(scores[p] + k, sums);
        }
    }
}

/* Scores to exp(score - largest); returns the largest, and *sum. What is past count up to whole
 * vectors is overwritten. A score of NaN makes the sum NaN. */
INLINE float exponentials(float *scores, int count, float *sum) {
    float lanes[LANES], most = scores[0], all = 0.0f;
    for (int k = count; k % LANES; k++) scores[k] = most;
    VF largest = VF_SET(most), sums = VF_ZERO();
    for (int k = 0; k < count; k += LANES) largest = VF_MAX(VF_LOAD(scores + k), largest);
    VF_STORE(lanes, largest);
    for (int i = 0; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    for (int k = 0; k < count; k += LANES)
        VF_STORE(scores + k, exp_clamped(VF_SUB(VF_LOAD(scores + k), VF_SET(most))));
    for (int k = count; k % LANES; k++) scores[k] = 0.0f;
    for (int k = 0; k < count; k += LANES) sums = VF_ADD(sums, VF_LOAD(scores + k));
    VF_STORE(lanes, sums);
    for (int i = 0; i < LANES; i++) all += lanes[i];
    *sum = all;
    return most;
}

/* out += sum over n values of a tile, in order, of weight * value, for N queries; M vectors of it
 * at i. */
INLINE void add_vectors(const int N, const int M, const float *const *weights, const float *tile,
                        int64_t stride, int n, int i, float *const *out) {
    VF acc[2][4];
    UNROLL
    for (int p = 0; p < N; p++) {
        UNROLL
        for (int j = 0; j < M; j++) acc[p][j] = VF_LOAD(out[p] + i + j * LANES);
    }
    for (int k = 0; k < n; k++) {
        const float *value = tile + k * stride + i;
        VF w[2];
        UNROLL
        for (int p = 0; p < N; p++) w[p] = VF_SET(weights[p][k]);
        UNROLL
        for (int j = 0; j < M; j++) {
            const VF y = VF_LOAD(value + j * LANES);
            UNROLL
            for (int p = 0; p < N; p++) acc[p][j] = VF_FMA(w[p], y, acc[p][j]);
        }
    }
    UNROLL
    for (int p = 0; p < N; p++) {
        UNROLL
        for (int j = 0; j < M; j++) VF_STORE(out[p] + i + j * LANES, acc[p][j]);
    }
}

INLINE void add_values(const int N, int dim, const float *const *weights, const float *tile,
                       int64_t stride, int n, float *const *out) {
    int i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES)
        add_vectors(N, 4, weights, tile, stride, n, i, out);
    for (; i < dim; i += LANES) add_vectors(N, 1, weights, tile, stride, n, i, out);
}

static int last_token(const ktk_attend *a) {
    int last = 0;
    for (int g = 0; g < a->num_queries; g++) last = a->end[g] > last ? a->end[g] : last;
    return last;
}

/* The tokens of a tile that a query sees: [*begin, *end) from the tile's first on; whether any. */
INLINE int seen(const ktk_attend *a, int query, int first, int *begin, int *end) {
    *begin = a->begin[query] > first ? a->begin[query] - first : 0;
    *end = a->end[query] - first < KTK_ATTEND_TILE ? a->end[query] - first : KTK_ATTEND_TILE;
    return *begin < *end;
}

INLINE void score_keys(const ktk_attend *a, const ktk_tiles *keys, int from, int adds, float *tile,
                       float *scores) {
    const int last = last_token(a);
    for (int first = 0; first < last; first += KTK_ATTEND_TILE) {
        const int n = last - first < KTK_ATTEND_TILE ? last - first : KTK_ATTEND_TILE;
        int64_t stride;
        const float *rows = rows_of(a->dtype, keys, first, n, tile, &stride);
        const float *q[KTK_ATTEND_QUERIES + 1];
        float *at[KTK_ATTEND_QUERIES + 1];
        int count = 0, begin, end;
        for (int g = 0; g < a->num_queries; g++)
            if (seen(a, g, first, &begin, &end)) {
                q[count] = a->q[g] + from;
                at[count++] = scores + g * KTK_ATTEND_SCORES + first;
            }
        int g = 0;
        for (; g + 2 <= count; g += 2)
            score_tile(2, keys->dim, q + g, rows, stride, n, adds, at + g);
        if (g < count) score_tile(1, keys->dim, q + g, rows, stride, n, adds, at + g);
    }
}

void CAT(ktk_attend_, KTK_ISA)(const ktk_attend *a, float *tile) {
    const int dim = a->values.dim, last = last_token(a);
    float *scores = tile + KTK_ATTEND_TILE * ktk_attend_width(a->keys.dim, a->more.dim, dim);
    score_keys(a, &a->keys, 0, 0, tile, scores);
    if (a->more.dim) score_keys(a, &a->more, a->keys.dim, 1, tile, scores);
    for (int g = 0; g < a->num_queries; g++) {
        float *own = scores + g * KTK_ATTEND_SCORES + a->begin[g];
        a->most[g][0] = exponentials(own, a->end[g] - a->begin[g], &a->most[g][1]);
        memset(a->out[g], 0, 4 * (size_t)dim);
    }
    for (int first = 0; first < last; first += KTK_ATTEND_TILE) {
        const int n = last - first < KTK_ATTEND_TILE ? last - first : KTK_ATTEND_TILE;
        int64_t stride;
        const float *rows = rows_of(a->dtype, &a->values, first, n, tile, &stride);
        for (int g = 0, step, begin, end, other, others_end; g < a->num_queries; g += step) {
            step = 1;
            if (!seen(a, g, first, &begin, &end)) continue;
            if (g + 1 < a->num_queries && seen(a, g + 1, first, &other, &others_end) &&
                other == begin && others_end == end)
                step = 2;
            const float *weights[2], *from = rows + begin * stride;
            float *out[2];
            for (int p = 0; p < step; p++) {
                weights[p] = scores + (g + p) * KTK_ATTEND_SCORES + first + begin;
                out[p] = a->out[g + p];
            }
            if (step == 2)
                add_values(2, dim, weights, from, stride, end - begin, out);
            else
                add_values(1, dim, weights, from, stride, end - begin, out);
        }
    }
}
