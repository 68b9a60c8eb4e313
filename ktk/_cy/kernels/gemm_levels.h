/* nl4: 16 integer levels times an integer for each group of k, one fp32 scale a channel
 * (ktk/experts/layout.py). Included by gemm.c.
 *
 * Exact in int32 over an activation group, then int8's float steps: inner = fma(acc, activation
 * scale, inner), y = fma(inner, channel scale, 0); where one group covers the row the channel's
 * scale comes first (ktk/reference/linear.py).
 *
 * For each activation group of a panel, once for all tiles of rows: nibbles to u = level +
 * KTK_LEVEL_ZERO, one byte a k, by VPSHUFB, and multipliers to 16-bit lanes. Then a tile of rows,
 * 16 k at a time. VNNI: four VPDPBUSD to a sum of 16 k, then VPDPWSSD by the multiplier. Else four
 * VPMADDUBSW summed in 16 bits, then VPMADDWD by the multiplier. So the multiplier costs what
 * widening 16-bit sums costs anyhow, and float work comes once in an activation group.
 *
 * Sums of 16 bits may wrap on the way: with the rows' correction, -KTK_LEVEL_ZERO * sum of 16 codes
 * in the low half of a dword, they end within +-32512 for levels within +-16. Only the low half of
 * VPDPBUSD's sum is multiplied.
 *
 * Groups of 32 k are two of 16 with one multiplier; without groups all multipliers are 1. */
enum {
    LEVEL_GROUP = 16, /* k of a sum */
    MOST_CHUNK = 256, /* the largest activation group */
    CHUNK_CODES = MOST_CHUNK * KTK_PANEL,
    CHUNK_MULTIPLIERS = MOST_CHUNK / LEVEL_GROUP * KTK_PANEL * 4,
    CHUNK_BYTES = CHUNK_CODES + CHUNK_MULTIPLIERS
};

/* One activation group of a panel, 64-byte aligned: [k / 4][16][4] bytes, [k / 16][16] dwords. */
typedef struct {
    uint8_t *codes, *multipliers;
} level_chunk;

/* k [k, k + 8) of 16 channels, as codes have them: levels of the first four k and of the last. */
INLINE void levels_of(const uint8_t *codes, VI low[PV], VI high[PV]) {
    const VI levels = VI_LOAD_TABLE(ktk_levels), mask = VI_SET8(15);
    UNROLL
    for (int v = 0; v < PV; v++) {
        const VI c = VI_LOAD(codes + v * 32);
        low[v] = VI_SHUFFLE8(levels, VI_AND(c, mask));
        high[v] = VI_SHUFFLE8(levels, VI_AND(VI_SRL16(c, 4), mask));
    }
}

/* Indices of multipliers, a byte a channel, to dwords of two 16-bit lanes. */
INLINE void widen_multipliers(__m128i index, VI to[PV]) {
    const __m128i table = _mm_load_si128((const __m128i *)ktk_multipliers);
    const __m128i bytes = _mm_shuffle_epi8(table, _mm_and_si128(index, _mm_set1_epi8(15)));
#ifdef __AVX512F__
    const VI wide = _mm512_cvtepi8_epi32(bytes);
    to[0] = VI_AND(wide, VI_SET32(0xffff)); /* the high half of VPDPBUSD's sum counts nothing */
#ifndef __AVX512VNNI__
    to[0] = VI_OR(to[0], VI_SLL32(wide, 16));
#endif
#else
    const VI words = _mm256_permute4x64_epi64(_mm256_cvtepi8_epi16(bytes), 0xd8);
    to[0] = _mm256_unpacklo_epi16(words, words);
    to[1] = _mm256_unpackhi_epi16(words, words);
#endif
}

/* Multipliers of k [k, k + 16) and of the 16 behind. */
INLINE void multipliers_of(const ktk_matrix *w, const uint8_t *panel, int k, VI first[PV],
                           VI second[PV]) {
    panel += KTK_PANEL * 4; /* the channels' scales */
    if (w->multiplier_group == LEVEL_GROUP) {
        const __m128i both = _mm_loadu_si128((const __m128i *)(panel + k / 32 * KTK_PANEL));
        widen_multipliers(both, first);
        widen_multipliers(_mm_srli_epi16(both, 4), second);
        return;
    }
    if (w->multiplier_group) {
        const __m128i both = _mm_loadu_si128((const __m128i *)(panel + k / 64 * KTK_PANEL));
        widen_multipliers(k & 32 ? _mm_srli_epi16(both, 4) : both, first);
    } else {
        UNROLL
        for (int v = 0; v < PV; v++) first[v] = VI_SET32(INT8_UNIT == 4 ? 1 : 0x10001);
    }
    UNROLL
    for (int v = 0; v < PV; v++) second[v] = first[v];
}

/* k [begin, begin + num_k) of a panel; both are multiples of 32. */
INLINE void unpack_chunk(const ktk_matrix *w, const uint8_t *panel, int begin, int num_k,
                         const uint8_t *ahead, level_chunk to) {
    const int64_t first = w->code_offset + (int64_t)begin * KTK_PANEL / 2;
    const uint8_t *codes = panel + first;
    for (int k = 0; k < num_k; k += 8) {
        VI low[PV], high[PV];
        if (ahead) _mm_prefetch((const char *)ahead + first + k * KTK_PANEL / 2, _MM_HINT_T1);
        levels_of(codes + k * KTK_PANEL / 2, low, high);
        UNROLL
        for (int v = 0; v < PV; v++) {
            VI_STORE(to.codes + k * KTK_PANEL + v * 32, low[v]);
            VI_STORE(to.codes + k * KTK_PANEL + 64 + v * 32, high[v]);
        }
    }
    for (int k = 0; k < num_k; k += 32) {
        uint8_t *at = to.multipliers + k / LEVEL_GROUP * KTK_PANEL * 4;
        VI by[2][PV];
        multipliers_of(w, panel, begin + k, by[0], by[1]);
        UNROLL
        for (int half = 0; half < 2; half++) UNROLL
        for (int v = 0; v < PV; v++) VI_STORE(at + 64 * half + v * 32, by[half][v]);
    }
}

/* What a chunk's sums become: out is 0 or the sum of the chunks before. */
typedef struct {
    const uint8_t *scales; /* of the panel's channels; NULL before the last chunk */
    int is_first, scale_first;
} chunk_end;

/* sum += products of four k, of all rows. */
INLINE void dot_levels(const int MR, const VI w[PV], const uint8_t *rows, VI sum[MAX_ROWS][PV]) {
    UNROLL
    for (int m = 0; m < MR; m++) {
#ifdef __AVX512VNNI__
        VI_DOT_BROADCAST(sum[m][0], w[0], rows + 4 * m);
#else
        const VI quad = VI_SET32(load32(rows + 4 * m));
        UNROLL
        for (int v = 0; v < PV; v++) {
            sum[m][v] = VI_ADD16(sum[m][v], VI_MADDUBS(w[v], quad));
            VI_PIN(sum[m][v]);
        }
#endif
    }
}

/* One chunk, one tile: from the panel itself (IS_DIRECT: rows so few that nothing is gained by
 * unpacking it for others) or from `chunk`. */
INLINE void tile_levels(const int MR, const int IS_DIRECT, const ktk_matrix *w,
                        const uint8_t *panel, int begin, const level_chunk *chunk, int num_k,
                        const uint8_t *rows, const int32_t *sums, const float *a_scale,
                        chunk_end end, float *restrict out, int64_t out_stride) {
    const uint8_t *codes =
        IS_DIRECT ? panel + w->code_offset + (int64_t)begin * KTK_PANEL / 2 : chunk->codes;
    const uint8_t *multipliers = chunk->multipliers;
    VI acc[MAX_ROWS][PV];
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int v = 0; v < PV; v++) acc[m][v] = VI_ZERO();
    for (int k = 0; k < num_k; k += 32) {
        VI by[2][PV];
        if (IS_DIRECT) multipliers_of(w, panel, begin + k, by[0], by[1]);
        UNROLL
        for (int half = 0; half < 2; half++) {
            VI sum[MAX_ROWS][PV];
            UNROLL
            for (int m = 0; m < MR; m++) UNROLL
            for (int v = 0; v < PV; v++) sum[m][v] = VI_SET32(sums[m]);
            UNROLL
            for (int k8 = 0; k8 < LEVEL_GROUP; k8 += 8) {
                VI low[PV], high[PV];
                if (IS_DIRECT) {
                    levels_of(codes, low, high);
                    codes += 8 * KTK_PANEL / 2;
                } else {
                    UNROLL
                    for (int v = 0; v < PV; v++) low[v] = VI_LOAD(codes + v * 32);
                    UNROLL
                    for (int v = 0; v < PV; v++) high[v] = VI_LOAD(codes + 64 + v * 32);
                    codes += 8 * KTK_PANEL;
                }
                dot_levels(MR, low, rows, sum);
                dot_levels(MR, high, rows + 4 * MR, sum);
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
    }
    UNROLL
    for (int v = 0; v < PV; v++) {
        const VF scale = end.scales ? VF_LOAD(end.scales + 4 * v * LANES) : VF_ZERO();
        UNROLL
        for (int m = 0; m < MR; m++) {
            float *at = out + m * out_stride + v * LANES;
            const VF own = VF_SET(a_scale[m]);
            VF y = VF_FMA(VF_CVT(acc[m][v]), end.scale_first ? scale : own,
                          end.is_first ? VF_ZERO() : VF_LOAD(at));
            if (end.scales) y = VF_FMA(y, end.scale_first ? own : scale, VF_ZERO());
            VF_STORE(at, y);
        }
    }
}

/* Rows [0, num_rows) of a tile over the chunk at k. */
INLINE void tile_levels_of(int num_rows, int is_direct, const ktk_matrix *w, const uint8_t *panel,
                           int k, int num_k, const level_chunk *chunk, const tile_rows *tile,
                           chunk_end end, float *out, int64_t out_stride) {
    const uint8_t *rows = tile->codes + (int64_t)k * num_rows;
    const int32_t *sums = tile->correction + k / LEVEL_GROUP * num_rows;
    const float *a_scale = tile->scales + k / w->activation_group * num_rows;
#define TILE(MR, IS_DIRECT)                                                                        \
    tile_levels(MR, IS_DIRECT, w, panel, k, chunk, num_k, rows, sums, a_scale, end, out, out_stride)
    switch (num_rows * (is_direct ? -1 : 1)) {
    case -1:
        TILE(1, 1);
        break;
    case -2:
        TILE(2, 1);
        break;
    case -3:
        TILE(3, 1);
        break;
    case -4:
        TILE(4, 1);
        break;
    case 1:
        TILE(1, 0);
        break;
    case 2:
        TILE(2, 0);
        break;
    case 3:
        TILE(3, 0);
        break;
#if MOST_LEVEL_ROWS > 3
    case 4:
        TILE(4, 0);
        break;
    case 5:
        TILE(5, 0);
        break;
    case 6:
        TILE(6, 0);
        break;
    case 7:
        TILE(7, 0);
        break;
    case 8:
        TILE(8, 0);
        break;
#endif
    }
#undef TILE
}

void CAT(ktk_gemm_nl4_, KTK_ISA)(const ktk_gemm_args *g) {
    const ktk_matrix *w = g->w;
    const int num_rows = g->num_rows, num_k = w->padded_in;
    const int is_direct = num_rows <= DIRECT_ROWS;
    const int num_tiles = is_direct ? 1 : (num_rows + MOST_LEVEL_ROWS - 1) / MOST_LEVEL_ROWS;
    const level_chunk chunk = {g->work, g->work + CHUNK_CODES};
    uint8_t *work = g->work + CHUNK_BYTES;
    tile_rows tile[CALL_ROWS];
    for (int t = 0; t < num_tiles; t++) { /* of nearly equal height */
        const int first = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
        work = pack_tile(4, w, g->a, g->rows + first, end - first, work, &tile[t]);
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
            if (!is_direct) unpack_chunk(w, panel, k, many, ahead, chunk);
            for (int t = 0; t < num_tiles; t++) {
                const int first = t * num_rows / num_tiles;
                const int rows = (t + 1) * num_rows / num_tiles - first;
                tile_levels_of(rows, is_direct, w, panel, k, many, &chunk, &tile[t], end,
                               g->out + first * g->out_stride + p * KTK_PANEL, g->out_stride);
            }
        }
    }
}
