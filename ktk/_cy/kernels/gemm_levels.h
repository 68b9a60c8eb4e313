/* nl2, nl3, nl4: 4, 8 or 16 integer levels times an integer for each group of k, one fp32 scale a
 * channel (ktk/experts/layout.py). Included by gemm.c.
 *
 * Exact in int32 over an activation group, then int8's float steps: inner = fma(acc, activation
 * scale, inner), y = fma(inner, channel scale, 0); where one group covers the row the channel's
 * scale comes first (ktk/reference/linear.py).
 *
 * A tile of rows, 16 k at a time. VNNI: four VPDPBUSD to a sum of 16 k, then VPDPWSSD by the
 * multiplier. Else four VPMADDUBSW summed in 16 bits, then VPMADDWD by the multiplier. So the
 * multiplier costs what widening 16-bit sums costs anyhow, and float work comes once in an
 * activation group.
 *
 * Up to DIRECT_ROWS rows take a panel's codes and multipliers where they lie. For more, each
 * activation group of the panel is unpacked once for all tiles. One factor of VPMADDUBSW is
 * unsigned. On the direct way (and for VPDPBUSD) it is the weight, level + KTK_LEVEL_ZERO, and
 * rows bring the correction, -KTK_LEVEL_ZERO * sum of 16 codes, in the low half of a dword: sums of
 * 16 bits may wrap on the way and end within +-32512 for levels within +-16. On the other it is the
 * activation, code + ACTIVATION_ZERO: sums stay within +-32640, and the correction, of the weights
 * alone, comes once for all rows. That spares one of ten instructions of a row.
 *
 * Groups of 32 k are two of 16 with one multiplier; without groups all multipliers are 1. */
#include "level_codes.h"

enum {
    LEVEL_GROUP = 16, /* k of a sum */
    MOST_CHUNK = 256, /* the largest activation group */
    CHUNK_CODES = MOST_CHUNK * KTK_PANEL,
    CHUNK_MULTIPLIERS = MOST_CHUNK / LEVEL_GROUP * KTK_PANEL * 4,
    CHUNK_CORRECTION = KTK_PANEL * 4,
    CHUNK_BYTES = CHUNK_CODES + CHUNK_MULTIPLIERS + CHUNK_CORRECTION,
#ifdef __AVX512VNNI__
    ROWS_ARE_UNSIGNED = 0, /* of an unpacked chunk: VPDPBUSD broadcasts its signed factor */
#else
    ROWS_ARE_UNSIGNED = 1,
#endif
    ACTIVATION_ZERO = 128,
#ifdef __AVX512F__
    MULTIPLIER_SHIFT = 0
#else
    MULTIPLIER_SHIFT = 8 /* in the high byte of its lane it is widened by moving it there */
#endif
};

/* One activation group of a panel, 64-byte aligned: [k / 4][16][4] bytes, [k / 16][16] dwords;
 * correction int32[16], what sums begin with. */
typedef struct {
    uint8_t *codes, *multipliers, *correction;
} level_chunk;

/* Eight k of 16 channels, a pair of level_codes.h: levels of the first four and of the last. */
INLINE void levels_of(const int BITS, VI levels, const uint8_t *unit, const int pair, VI low[PV],
                      VI high[PV]) {
    UNROLL
    for (int v = 0; v < PV; v++) {
        VI first, second;
        level_pair(BITS, unit, pair, v * 32, &first, &second);
        low[v] = VI_SHUFFLE8(levels, first);
        high[v] = VI_SHUFFLE8(levels, second);
    }
}

/* Indices of multipliers, a byte a channel, to dwords of two 16-bit lanes, times 1 <<
 * MULTIPLIER_SHIFT. */
INLINE void widen_multipliers(const int BITS, __m128i index, VI to[PV]) {
    const __m128i table = _mm_load_si128((const __m128i *)ktk_levels[BITS].multipliers);
    const __m128i bytes = _mm_shuffle_epi8(table, _mm_and_si128(index, _mm_set1_epi8(15)));
#ifdef __AVX512F__
    const VI wide = _mm512_cvtepi8_epi32(bytes);
    to[0] = VI_AND(wide, VI_SET32(0xffff)); /* the high half of VPDPBUSD's sum counts nothing */
#ifndef __AVX512VNNI__
    to[0] = VI_OR(to[0], VI_SLL32(wide, 16));
#endif
#else
    const VI both = _mm256_broadcastsi128_si256(bytes);
#define HIGH_BYTES(C) ((C) << 24 | 0x800080 | (C) << 8) /* of a dword; 0x80 makes a zero */
    UNROLL
    for (int v = 0; v < PV; v++) {
        const int c = v * LANES;
        to[v] = VI_SHUFFLE8(both, _mm256_setr_epi32(HIGH_BYTES(c), HIGH_BYTES(c + 1),
                                                    HIGH_BYTES(c + 2), HIGH_BYTES(c + 3),
                                                    HIGH_BYTES(c + 4), HIGH_BYTES(c + 5),
                                                    HIGH_BYTES(c + 6), HIGH_BYTES(c + 7)));
    }
#undef HIGH_BYTES
#endif
}

/* Multipliers of k [k, k + 16) and of the 16 behind. */
INLINE void multipliers_of(const int BITS, const ktk_matrix *w, const uint8_t *panel, int k,
                           VI first[PV], VI second[PV]) {
    panel += KTK_PANEL * 4; /* the channels' scales */
    if (w->multiplier_group == LEVEL_GROUP) {
        const __m128i both = _mm_loadu_si128((const __m128i *)(panel + k / 32 * KTK_PANEL));
        widen_multipliers(BITS, both, first);
        widen_multipliers(BITS, _mm_srli_epi16(both, 4), second);
        return;
    }
    if (w->multiplier_group) {
        const __m128i both = _mm_loadu_si128((const __m128i *)(panel + k / 64 * KTK_PANEL));
        widen_multipliers(BITS, k & 32 ? _mm_srli_epi16(both, 4) : both, first);
    } else {
        UNROLL
        for (int v = 0; v < PV; v++)
            first[v] = VI_SET32((INT8_UNIT == 4 ? 1 : 0x10001) << MULTIPLIER_SHIFT);
    }
    UNROLL
    for (int v = 0; v < PV; v++) second[v] = first[v];
}

/* k [begin, begin + num_k) of a panel; both are multiples of 32. */
INLINE void unpack_chunk(const int BITS, const ktk_matrix *w, const uint8_t *panel, int begin,
                         int num_k, level_chunk to) {
    const uint8_t *unit = panel + level_codes_at(w, BITS, begin);
    const VI levels = VI_SUB8(VI_LOAD_TABLE(ktk_levels[BITS].levels),
                              VI_SET8(ROWS_ARE_UNSIGNED ? KTK_LEVEL_ZERO : 0));
    VI correction[PV];
    UNROLL
    for (int v = 0; v < PV; v++) correction[v] = VI_ZERO();
    for (int k = 0; k < num_k; k += 32, unit += LEVEL_UNIT_BYTES * BITS) {
        uint8_t *codes_to = to.codes + k * KTK_PANEL;
        uint8_t *multipliers_to = to.multipliers + k / LEVEL_GROUP * KTK_PANEL * 4;
        VI by[2][PV];
        multipliers_of(BITS, w, panel, begin + k, by[0], by[1]);
        UNROLL
        for (int half = 0; half < 2; half++) {
            VI sum[PV];
            UNROLL
            for (int k8 = 0; k8 < LEVEL_GROUP; k8 += 8) {
                VI low[PV], high[PV];
                levels_of(BITS, levels, unit, half * 2 + k8 / 8, low, high);
                UNROLL
                for (int v = 0; v < PV; v++) {
                    VI_STORE(codes_to + v * 32, low[v]);
                    VI_STORE(codes_to + 64 + v * 32, high[v]);
                    const VI both = VI_ADD8(low[v], high[v]);
                    sum[v] = k8 ? VI_ADD8(sum[v], both) : both; /* within +-64 */
                }
                codes_to += 8 * KTK_PANEL;
            }
            UNROLL
            for (int v = 0; v < PV; v++) {
                VI_STORE(multipliers_to + v * 32, by[half][v]);
                const VI wide = VI_MADDUBS(VI_SET8((char)ACTIVATION_ZERO), sum[v]);
                correction[v] = VI_SUB32(correction[v], VI_MADD(wide, by[half][v]));
            }
            multipliers_to += KTK_PANEL * 4;
        }
    }
    UNROLL
    for (int v = 0; v < PV; v++)
        VI_STORE(to.correction + v * 32, ROWS_ARE_UNSIGNED ? correction[v] : VI_ZERO());
}

/* What a chunk's sums become: out is 0 or the sum of the chunks before. */
typedef struct {
    const uint8_t *scales; /* of the panel's channels; NULL before the last chunk */
    int is_first, scale_first;
} chunk_end;

/* sum += products of four k, of all rows; IS_FIRST: sum = them. */
INLINE void dot_levels(const int MR, const int IS_UNSIGNED, const int IS_FIRST, const VI w[PV],
                       const uint8_t *rows, VI sum[MAX_ROWS][PV]) {
    (void)IS_UNSIGNED, (void)IS_FIRST; /* of VPDPBUSD */
    UNROLL
    for (int m = 0; m < MR; m++) {
#ifdef __AVX512VNNI__
        VI_DOT_BROADCAST(sum[m][0], w[0], rows + 4 * m);
#else
        const VI quad = VI_SET32(load32(rows + 4 * m));
        UNROLL
        for (int v = 0; v < PV; v++) {
            const VI product = IS_UNSIGNED ? VI_MADDUBS(quad, w[v]) : VI_MADDUBS(w[v], quad);
            sum[m][v] = IS_FIRST ? product : VI_ADD16(sum[m][v], product);
            VI_PIN(sum[m][v]);
        }
#endif
    }
}

/* One chunk, one tile: from the panel itself, of codes of BITS (rows so few that nothing is gained
 * by unpacking it for others), or, BITS 0, from `chunk`. bits: the codes'. */
INLINE void tile_levels(const int MR, const int BITS, int bits, const ktk_matrix *w,
                        const uint8_t *panel, int begin, const level_chunk *chunk, int num_k,
                        fetching fetch, const uint8_t *rows, const int32_t *sums,
                        const float *a_scale, chunk_end end, float *restrict out,
                        int64_t out_stride) {
    const int IS_DIRECT = BITS != 0, IS_UNSIGNED = !IS_DIRECT && ROWS_ARE_UNSIGNED;
    const int64_t first = level_codes_at(w, bits, begin);
    const uint8_t *unit = panel + first, *codes = chunk->codes, *multipliers = chunk->multipliers;
    int until = fetch.turn;
    VI acc[MAX_ROWS][PV];
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++)
        acc[m][v] = IS_UNSIGNED ? VI_LOAD(chunk->correction + v * 32) : VI_ZERO();
    for (int k = 0; k < num_k; k += 32) {
        VI by[2][PV];
        if ((!IS_DIRECT || MR > STREAMED_ROWS(KTK_INT4)) && fetch.ahead && until-- == 0) {
            until = fetch.turns - 1;
            for (int i = 0; i < bits; i++)
                prefetch(fetch.ahead + first + k / 32 * LEVEL_UNIT_BYTES * bits + 64 * i, 64);
        }
        if (IS_DIRECT) multipliers_of(BITS, w, panel, begin + k, by[0], by[1]);
        UNROLL
        for (int half = 0; half < 2; half++) {
            VI sum[MAX_ROWS][PV];
            UNROLL
            for (int m = 0; m < MR; m++) UNROLL
            for (int v = 0; v < PV; v++)
                if (!IS_UNSIGNED) sum[m][v] = VI_SET32(sums[m]);
            UNROLL
            for (int k8 = 0; k8 < LEVEL_GROUP; k8 += 8) {
                VI low[PV], high[PV];
                if (IS_DIRECT) {
                    levels_of(BITS, VI_LOAD_TABLE(ktk_levels[BITS].levels), unit, half * 2 + k8 / 8,
                              low, high);
                } else {
                    UNROLL
                    for (int v = 0; v < PV; v++) low[v] = VI_LOAD(codes + v * 32);
                    UNROLL
                    for (int v = 0; v < PV; v++) high[v] = VI_LOAD(codes + 64 + v * 32);
                    codes += 8 * KTK_PANEL;
                }
                dot_levels(MR, IS_UNSIGNED, IS_UNSIGNED && !k8, low, rows, sum);
                dot_levels(MR, IS_UNSIGNED, 0, high, rows + 4 * MR, sum);
                rows += 8 * MR;
            }
            if (!IS_DIRECT) {
                UNROLL
                for (int v = 0; v < PV; v++) by[half][v] = VI_LOAD(multipliers + v * 32);
                multipliers += KTK_PANEL * 4;
            }
            sums += MR;
            UNROLL
            for (int m = 0; m < MR; m++) UNROLL
            for (int v = 0; v < PV; v++) {
#ifdef __AVX512VNNI__
                acc[m][v] = _mm512_dpwssd_epi32(acc[m][v], sum[m][v], by[half][v]);
#else
                acc[m][v] = VI_ADD32(acc[m][v], VI_MADD(sum[m][v], by[half][v]));
                VI_PIN(acc[m][v]);
#endif
            }
        }
        unit += LEVEL_UNIT_BYTES * BITS;
    }
    UNROLL
    for (int v = 0; v < PV; v++) {
        const VF scale = end.scales ? VF_LOAD(end.scales + 4 * v * LANES) : VF_ZERO();
        UNROLL
        for (int m = 0; m < MR; m++) {
            float *at = out + m * out_stride + v * LANES;
            const VF own = VF_SET(a_scale[m]);
            VF y = VF_FMA(VF_CVT(VI_SRA32(acc[m][v], MULTIPLIER_SHIFT)),
                          end.scale_first ? scale : own, end.is_first ? VF_ZERO() : VF_LOAD(at));
            if (end.scales) y = VF_FMA(y, end.scale_first ? own : scale, VF_ZERO());
            VF_STORE(at, y);
        }
    }
}

/* A tile's rows, and where the chunk at k of them lies. */
typedef struct {
    const uint8_t *rows;
    const int32_t *sums;
    const float *a_scale;
} tile_chunk;

INLINE tile_chunk chunk_of(const ktk_matrix *w, const tile_rows *tile, int num_rows, int k) {
    return (tile_chunk){tile->codes + (int64_t)k * num_rows,
                        tile->correction + k / LEVEL_GROUP * num_rows,
                        tile->scales + k / w->activation_group * num_rows};
}

#define TILE(MR, BITS, SIZE)                                                                       \
    case MR:                                                                                       \
        tile_levels(MR, BITS, SIZE, w, panel, k, chunk, num_k, fetch, a.rows, a.sums, a.a_scale,   \
                    end, out, out_stride);                                                         \
        break;

/* Rows of a tile over the chunk at k of a panel, direct. */
INLINE void tile_direct(const int BITS, int num_rows, const ktk_matrix *w, const uint8_t *panel,
                        int k, int num_k, const level_chunk *chunk, fetching fetch, tile_chunk a,
                        chunk_end end, float *out, int64_t out_stride) {
    switch (num_rows) {
        TILE(1, BITS, BITS)
        TILE(2, BITS, BITS)
        TILE(3, BITS, BITS)
        TILE(4, BITS, BITS)
#if DIRECT_ROWS > 4
        TILE(5, BITS, BITS)
#endif
    }
}

/* The same of what is unpacked, from codes of any size. */
static __attribute__((noinline)) void tile_unpacked(int bits, int num_rows, const ktk_matrix *w,
                                                    const uint8_t *panel, int k, int num_k,
                                                    const level_chunk *chunk, fetching fetch,
                                                    tile_chunk a, chunk_end end, float *out,
                                                    int64_t out_stride) {
    switch (num_rows) {
        TILE(2, 0, bits)
        TILE(3, 0, bits)
#if MOST_LEVEL_ROWS > 3
        TILE(4, 0, bits)
        TILE(5, 0, bits)
        TILE(6, 0, bits)
        TILE(7, 0, bits)
        TILE(8, 0, bits)
#endif
    }
}
#undef TILE

INLINE void gemm_levels(const int BITS, const ktk_gemm_args *g) {
    const ktk_matrix *w = g->w;
    const int num_rows = g->num_rows, num_k = w->padded_in;
    const int is_direct = num_rows <= DIRECT_ROWS;
    const int num_tiles = is_direct ? 1 : (num_rows + MOST_LEVEL_ROWS - 1) / MOST_LEVEL_ROWS;
    const level_chunk chunk = {g->work, g->work + CHUNK_CODES,
                               g->work + CHUNK_CODES + CHUNK_MULTIPLIERS};
    uint8_t *work = g->work + CHUNK_BYTES;
    tile_rows tile[CALL_ROWS];
    for (int t = 0; t < num_tiles; t++) { /* of nearly equal height */
        const int first = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
        uint8_t *codes = work;
        work = pack_tile(4, w, g->a, g->rows + first, end - first, work, &tile[t]);
        if (ROWS_ARE_UNSIGNED && !is_direct)
            for (int i = 0; i < num_k * (end - first); i++) codes[i] ^= ACTIVATION_ZERO;
    }
    for (int p = 0; p < g->num_panels; p++) {
        const uint8_t *panel = g->panels + p * w->panel_bytes;
        const uint8_t *ahead = p + 1 < g->num_panels ? panel + w->panel_bytes : g->next;
        for (int i = 0; i < w->code_offset; i += 64)
            _mm_prefetch((const char *)panel + i, _MM_HINT_T0);
        for (int k = 0; k < num_k; k += w->activation_group) {
            const int many = num_k - k < w->activation_group ? num_k - k : w->activation_group;
            const int is_last = k + many == num_k;
            const chunk_end end = {is_last ? panel : NULL, !k, num_k <= w->activation_group};
            if (!is_direct) unpack_chunk(BITS, w, panel, k, many, chunk);
            for (int t = 0; t < num_tiles; t++) {
                const int first = t * num_rows / num_tiles;
                const int rows = (t + 1) * num_rows / num_tiles - first;
                const fetching fetch = {ahead, t, num_tiles};
                const tile_chunk a = chunk_of(w, &tile[t], rows, k);
                float *out = g->out + first * g->out_stride + p * KTK_PANEL;
                if (is_direct)
                    tile_direct(BITS, rows, w, panel, k, many, &chunk, fetch, a, end, out,
                                g->out_stride);
                else
                    tile_unpacked(BITS, rows, w, panel, k, many, &chunk, fetch, a, end, out,
                                  g->out_stride);
            }
        }
    }
}

#define GEMM_LEVELS(BITS)                                                                          \
    void CAT(ktk_gemm_nl##BITS##_, KTK_ISA)(const ktk_gemm_args *g) { gemm_levels(BITS, g); }
GEMM_LEVELS(2)
GEMM_LEVELS(3)
GEMM_LEVELS(4)
