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

/* Eight or sixteen indices of multipliers, a byte each, to dwords of two 16-bit lanes. */
INLINE VI widen_multipliers(__m128i index) {
    const __m128i m = _mm_shuffle_epi8(_mm_load_si128((const __m128i *)ktk_multipliers), index);
#ifdef __AVX512F__
    const VI wide = _mm512_cvtepi8_epi32(m);
#else
    const VI wide = _mm256_cvtepi8_epi32(m);
#endif
#ifdef __AVX512VNNI__
    return VI_AND(wide, VI_SET32(0xffff)); /* the sum's high half counts nothing */
#else
    return VI_OR(VI_AND(wide, VI_SET32(0xffff)), VI_SLL32(wide, 16));
#endif
}

/* k [begin, begin + num_k) of a panel; both are multiples of 32. */
INLINE void unpack_chunk(const ktk_matrix *w, const uint8_t *panel, int begin, int num_k,
                         const uint8_t *ahead, level_chunk to) {
    const VI levels = VI_LOAD_TABLE(ktk_levels), mask = VI_SET8(15);
    const int64_t first = w->code_offset + (int64_t)begin * KTK_PANEL / 2;
    const uint8_t *codes = panel + first;
    for (int k = 0; k < num_k; k += 8) {
        if (ahead) _mm_prefetch((const char *)ahead + first + k * KTK_PANEL / 2, _MM_HINT_T1);
        UNROLL
        for (int v = 0; v < PV; v++) {
            const VI c = VI_LOAD(codes + k * KTK_PANEL / 2 + v * 32);
            uint8_t *at = to.codes + k * KTK_PANEL + v * 32;
            VI_STORE(at, VI_SHUFFLE8(levels, VI_AND(c, mask)));
            VI_STORE(at + 64, VI_SHUFFLE8(levels, VI_AND(VI_SRL16(c, 4), mask)));
        }
    }
    const int group = w->multiplier_group;
    for (int k = 0; k < num_k; k += LEVEL_GROUP) {
        uint8_t *at = to.multipliers + k / LEVEL_GROUP * KTK_PANEL * 4;
        const int g = group ? (begin + k) / group : 0;
        const uint8_t *pair = panel + KTK_PANEL * 4 + g / 2 * KTK_PANEL;
        UNROLL
        for (int v = 0; v < PV; v++) {
            VI m = VI_SET32(PV == 1 && INT8_UNIT == 4 ? 1 : 0x10001);
            if (group) {
#ifdef __AVX512F__
                __m128i index = _mm_loadu_si128((const __m128i *)pair);
#else
                __m128i index = _mm_loadl_epi64((const __m128i *)(pair + v * LANES));
#endif
                if (g % 2) index = _mm_srli_epi16(index, 4);
                m = widen_multipliers(_mm_and_si128(index, _mm_set1_epi8(15)));
            }
            VI_STORE(at + v * 32, m);
        }
    }
}

/* What a chunk's sums become: out is 0 or the sum of the chunks before. */
typedef struct {
    const uint8_t *scales; /* of the panel's channels; NULL before the last chunk */
    int is_first, scale_first;
} chunk_end;

/* One chunk, one tile; acc and sum of a vector of channels stay in registers. */
INLINE void tile_levels(const int MR, const level_chunk *chunk, int num_k, const uint8_t *a,
                        const int32_t *correction, const float *a_scale, chunk_end end,
                        float *restrict out, int64_t out_stride) {
    UNROLL
    for (int v = 0; v < PV; v++) {
        const uint8_t *codes = chunk->codes + v * 32, *multipliers = chunk->multipliers + v * 32;
        const uint8_t *rows = a;
        const int32_t *sums = correction;
        VI acc[MAX_ROWS];
        UNROLL
        for (int m = 0; m < MR; m++) acc[m] = VI_ZERO();
        for (int k = 0; k < num_k; k += LEVEL_GROUP) {
            VI sum[MAX_ROWS];
            UNROLL
            for (int m = 0; m < MR; m++) sum[m] = VI_SET32(sums[m]);
            UNROLL
            for (int q = 0; q < LEVEL_GROUP / 4; q++) {
                const VI w = VI_LOAD(codes + 64 * q);
                UNROLL
                for (int m = 0; m < MR; m++) {
#ifdef __AVX512VNNI__
                    VI_DOT_BROADCAST(sum[m], w, rows + 4 * (MR * q + m));
#else
                    const VI quad = VI_SET32(load32(rows + 4 * (MR * q + m)));
                    sum[m] = VI_ADD16(sum[m], VI_MADDUBS(w, quad));
                    VI_PIN(sum[m]);
#endif
                }
            }
            const VI by = VI_LOAD(multipliers);
            UNROLL
            for (int m = 0; m < MR; m++) {
#ifdef __AVX512VNNI__
                acc[m] = _mm512_dpwssd_epi32(acc[m], sum[m], by);
#else
                acc[m] = VI_ADD32(acc[m], VI_MADD(sum[m], by));
                VI_PIN(acc[m]);
#endif
            }
            codes += LEVEL_GROUP * KTK_PANEL;
            multipliers += KTK_PANEL * 4;
            rows += LEVEL_GROUP * MR;
            sums += MR;
        }
        const VF scale = end.scales ? VF_LOAD(end.scales + 4 * v * LANES) : VF_ZERO();
        UNROLL
        for (int m = 0; m < MR; m++) {
            float *at = out + m * out_stride + v * LANES;
            const VF own = VF_SET(a_scale[m]);
            VF y = VF_FMA(VF_CVT(acc[m]), end.scale_first ? scale : own,
                          end.is_first ? VF_ZERO() : VF_LOAD(at));
            if (end.scales) y = VF_FMA(y, end.scale_first ? own : scale, VF_ZERO());
            VF_STORE(at, y);
        }
    }
}

INLINE void tile_levels_of(int num_rows, const level_chunk *chunk, int num_k, const uint8_t *a,
                           const int32_t *correction, const float *a_scale, chunk_end end,
                           float *out, int64_t out_stride) {
    switch (num_rows) {
#define TILE(MR)                                                                                   \
    case MR:                                                                                       \
        tile_levels(MR, chunk, num_k, a, correction, a_scale, end, out, out_stride);               \
        break;
        TILE(1)
        TILE(2)
        TILE(3)
        TILE(4)
        TILE(5)
        TILE(6)
#if MAX_ROWS > 6
        TILE(7)
        TILE(8)
#endif
#undef TILE
    }
}

void CAT(ktk_gemm_nl4_, KTK_ISA)(const ktk_gemm_args *g) {
    const ktk_matrix *w = g->w;
    const int num_rows = g->num_rows, num_k = w->padded_in;
    const int num_tiles =
        num_rows <= MAX_ROWS ? 1 : (num_rows + BEST_LEVEL_ROWS - 1) / BEST_LEVEL_ROWS;
    const level_chunk chunk = {g->work, g->work + CHUNK_CODES};
    uint8_t *work = g->work + CHUNK_BYTES;
    tile_rows tile[CALL_ROWS];
    for (int t = 0; t < num_tiles; t++) {
        const int first = t * num_rows / num_tiles, end = (t + 1) * num_rows / num_tiles;
        work = pack_tile(4, w, g->a, g->rows + first, end - first, work, &tile[t]);
    }
    for (int p = 0; p < g->num_panels; p++) {
        const uint8_t *panel = g->panels + p * w->panel_bytes;
        const uint8_t *next = p + 1 < g->num_panels ? panel + w->panel_bytes : g->next;
        const uint8_t *ahead = num_rows > STREAMED_LEVEL_ROWS ? next : NULL;
        for (int i = 0; i < w->code_offset; i += 64)
            _mm_prefetch((const char *)panel + i, _MM_HINT_T0);
        for (int k = 0; k < num_k; k += w->activation_group) {
            const int many = num_k - k < w->activation_group ? num_k - k : w->activation_group;
            const int is_last = k + many == num_k;
            const chunk_end end = {is_last ? panel : NULL, !k, num_k <= w->activation_group};
            unpack_chunk(w, panel, k, many, ahead, chunk);
            for (int t = 0; t < num_tiles; t++) {
                const int first = t * num_rows / num_tiles;
                const int rows = (t + 1) * num_rows / num_tiles - first;
                tile_levels_of(rows, &chunk, many, tile[t].codes + (int64_t)k * rows,
                               tile[t].correction + (int64_t)k / LEVEL_GROUP * rows,
                               tile[t].scales + (int64_t)k / w->activation_group * rows, end,
                               g->out + first * g->out_stride + p * KTK_PANEL, g->out_stride);
            }
        }
    }
}
