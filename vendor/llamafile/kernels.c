/* Experts in GGUF block formats times rows of activations, straight from the file's bytes: the
 * kernels of one ISA level. Compiled once per level with KTK_ISA its name; one with instructions
 * for BF16 alone has no other kernel.
 *
 * Weights: rows of out features, each row its blocks one behind the other, as the file has them.
 * Sixteen rows (a panel) are run at a time, one row a lane: their bytes are transposed four at a
 * time, so that a vector holds the same four bytes of all rows, and a format says what these bytes
 * mean (blocks/NAME.h). Few rows of activations are multiplied with what comes out at once; for
 * many it is laid down for a whole panel first, in a buffer that stays in cache. Both ways add the
 * same numbers in the same order, so a token's result does not depend on what it is batched with.
 *
 * A strip is LANES rows of weights, one a lane: gather.h puts the bytes of a block of its rows side
 * by side, decode.h makes codes and scales of them. For few rows of activations multiply.h takes
 * these as they come, in registers. For more they are laid down in a buffer, a chunk of k at a
 * time, and tiles of up to MAX_ROWS rows run over it.
 *
 * Symbols: lf_gemm_f32_avx2 lf_gemm_f32_avx512 lf_gemm_f32_avx512vnni lf_gemm_f16_avx2
 *   lf_gemm_f16_avx512 lf_gemm_f16_avx512vnni lf_gemm_bf16_avx2 lf_gemm_bf16_avx512
 *   lf_gemm_bf16_avx512vnni lf_gemm_bf16_avx512bf16. */
#include <string.h>

#include "interleave.h"
#include "decode.h"

/* k that are laid down at a time: for up to two tiles they stay in the first-level cache (7-12 %
 * faster at 8 and 16 rows); for more starting tiles anew would cost what that saves. */
enum { SHORT_CHUNK = 512, CHUNK = 4096, MAX_TILES = CALL_ROWS / MAX_ROWS };
/* What is laid down of a chunk: dwords of floats, or codes with a scale and a minimum for 16. */
enum { LAID_BYTES = CHUNK * LANES * 4 };
/* Rows that are multiplied with the registers a decoder fills: of LF_FUSED_FORMATS, of others. */
#ifdef __AVX512F__
enum { FUSED_ROWS = 4, FEW_FUSED_ROWS = 2 };
#else
enum { FUSED_ROWS = 2, FEW_FUSED_ROWS = 2 };
#endif

/* -- blocks through the decoder
 * -------------------------------------------------------------------------------- */

/* Blocks [first, first + num_blocks) of a strip; MR as in sink. ahead: the strip that is wanted
 * next, or NULL.
 *
 * The decoder comes as an argument, not out of a switch over FORMAT: GCC would inline every
 * format's decoder into every format's kernels before it sees which one is meant: a fifth of its
 * time, and half the memory. */
INLINE void run_blocks(const int FORMAT, decode_fn *const decode, const int MR, const ktk_matrix *w,
                       const uint8_t *panel, int strip, int first, int num_blocks,
                       const uint8_t *ahead, sink *s) {
    const traits *t = &TRAITS[FORMAT];
    const int64_t row_bytes = t->row_head + (int64_t)w->padded_in / t->weights * t->bytes;
    const int lane = w->is_repacked ? strip * LANES : 0;
    const int step = w->is_repacked ? raw_bytes(FORMAT) : t->bytes;
    const uint8_t *head = panel + (w->is_repacked ? lane * t->row_head : strip * LANES * row_bytes);
    const uint8_t *at = (w->is_repacked ? panel + KTK_PANEL * t->row_head : head + t->row_head) +
                        (int64_t)first * step;
    const VF row_scale = row_scales(t->row_head, head, w->is_repacked ? t->row_head : row_bytes);
    uint8_t buffer[RAW_BYTES] __attribute__((aligned(64)));
    strip_rows rows = rows_at(at, row_bytes);
    /* Without a next strip: this one again, which costs little. */
    s->ahead = (ahead ? ahead : panel) + (int64_t)first * LANES * t->bytes;
    for (int b = 0; b < num_blocks; b++, at += step, step_rows(&rows, t->bytes)) {
        if (t->float_bytes) {
            fetch_ahead(FORMAT, s);
            uint8_t *to = MR ? buffer : s->to.codes;
            if (w->is_repacked)
                for (int i = 0; i < t->dwords; i++)
                    VI_STORE(to + i * VI_BYTES, VI_LOAD(at + 4 * lane + 64 * i));
            else
                gather(FORMAT, VI_BYTES, &rows, to, NULL);
            if (MR)
                accumulate_float(MR, FORMAT, to, t->dwords, &s->rows);
            else
                s->to.codes += t->dwords * VI_BYTES;
        } else if (t->dwords > FEW_DWORDS && FORMAT != KTK_BLOCK_q3_k) {
            /* Both orders of bytes through one copy of a long decoder (40 to 95 KB of code a format
             * were twice that) at the same speed; Q3_K's takes 5-20 % longer so. */
            const int is_there = w->is_repacked;
            const uint8_t *words = at + 64 * t->dwords + t->head_bytes * lane;
            const head_words heads = is_there ? load_heads(t->head_bytes, words)
                                              : gather(FORMAT, 64, &rows, buffer, NULL);
            decode(MR, (block){is_there ? at + 4 * lane : buffer, NULL, heads, row_scale}, s);
        } else if (w->is_repacked) {
            const uint8_t *heads = at + 64 * t->dwords + t->head_bytes * lane;
            decode(MR, (block){at + 4 * lane, NULL, load_heads(t->head_bytes, heads), row_scale},
                   s);
        } else if (t->dwords <= FEW_DWORDS) {
            VI few[FEW_DWORDS];
            const head_words heads = gather(FORMAT, 64, &rows, NULL, few);
            decode(MR, (block){NULL, few, heads, row_scale}, s);
        } else {
            const head_words heads = gather(FORMAT, 64, &rows, buffer, NULL);
            decode(MR, (block){buffer, NULL, heads, row_scale}, s);
        }
    }
}

/* MR rows of a tile straight from a strip. */
INLINE void fused(const int FORMAT, decode_fn *const decode, const int MR, const ktk_matrix *w,
                  const uint8_t *panel, int strip, const uint8_t *ahead, tile *rows) {
    sink s = {.rows = begin(MR, rows), .activation_group = w->activation_group};
    run_blocks(FORMAT, decode, MR, w, panel, strip, 0, w->padded_in / TRAITS[FORMAT].weights, ahead,
               &s);
    end(MR, &s.rows, rows);
}

typedef void lay_fn(const ktk_matrix *w, const uint8_t *panel, int strip, int first, int num_blocks,
                    const uint8_t *ahead, laid p);
typedef void fused_fn(const ktk_matrix *w, const uint8_t *panel, int strip, const uint8_t *ahead,
                      tile *rows);

INLINE void repack(const int FORMAT, const ktk_matrix *w, const uint8_t *panel, uint8_t *out) {
    const traits *t = &TRAITS[FORMAT];
    const int num_blocks = w->padded_in / t->weights;
    const int64_t row_bytes = t->row_head + (int64_t)num_blocks * t->bytes;
    for (int n = 0; n < KTK_PANEL && t->row_head; n++, out += t->row_head)
        memcpy(out, panel + n * row_bytes, (size_t)t->row_head);
    panel += t->row_head;
    for (int b = 0; b < num_blocks; b++, out += raw_bytes(FORMAT))
        for (int strip = 0; strip < STRIPS; strip++) {
            const strip_rows rows =
                rows_at(panel + strip * LANES * row_bytes + b * t->bytes, row_bytes);
            const head_words heads = gather(FORMAT, 64, &rows, out + strip * VI_BYTES, NULL);
            store_heads(t->head_bytes, heads, out + 64 * t->dwords + t->head_bytes * LANES * strip);
        }
}

typedef void repack_fn(const ktk_matrix *w, const uint8_t *panel, uint8_t *out);

/* A constant expression, so that GCC does not even look at what a format does not have. */
#define FUSED_BIT(NAME) | UINT64_C(1) << KTK_BLOCK_##NAME
#define FUSED_ROWS_OF(FORMAT)                                                                      \
    (((0 LF_FUSED_FORMATS(FUSED_BIT)) >> (FORMAT) & 1) ? FUSED_ROWS : FEW_FUSED_ROWS)

/* -- rows of activations
 * --------------------------------------------------------------------------------------- */

INLINE int dwords_of_row(const int FORMAT, const ktk_matrix *w) { /* units of four bytes */
    const traits *t = &TRAITS[FORMAT];
#ifdef __AVX512BF16__
    if (FORMAT == KTK_BLOCK_bf16) return w->padded_in / 2;
#endif
    return t->float_bytes ? w->padded_in : w->padded_in / 4;
}

INLINE uint8_t *align_64(uint8_t *p) { return (uint8_t *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

/* Where the rows of a tile begin. */
typedef struct {
    const uint8_t *a;
    const float *a_scale, *correction;
} start;

/* A tile before the first k. */
INLINE void restart(const ktk_matrix *w, const start *from, tile *t) {
    t->a = from->a;
    t->a_scale = from->a_scale;
    t->correction = from->correction;
    t->left = w->activation_group < w->padded_in ? w->activation_group : w->padded_in;
    t->rest = w->padded_in - t->left;
    for (int m = 0; m < t->num_rows; m++) t->inner[m] = t->y[m] = VF_ZERO();
}

/* Rows index[0 .. num_rows) side by side, at work (unless they are there); returns the end of them.
 */
INLINE uint8_t *pack_tile(const int FORMAT, const ktk_matrix *w, const ktk_rows *a,
                          const int32_t *index, int num_rows, uint8_t *work, start *t) {
    const traits *f = &TRAITS[FORMAT];
    const int units = dwords_of_row(FORMAT, w);
    t->a = num_rows == 1 && !IS_WIDE(f->most) ? a->codes + index[0] * a->code_stride : work;
    if (IS_WIDE(f->most)) { /* int16, each four k in the order 0 2 1 3 */
        for (int m = 0; m < num_rows && !a->are_packed; m++) {
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
    } else if (num_rows > 1) {
        if (!a->are_packed) interleave(a->codes, a->code_stride, index, num_rows, units, work);
        work += (int64_t)units * 4 * num_rows;
    }
    work = align_64(work);
    if (f->float_bytes) return work + 64; /* interleave writes a little past its end */
    const int groups = (w->padded_in + w->activation_group - 1) / w->activation_group,
              fines = w->padded_in / f->fine;
    float *scales = (float *)work, *correction = scales + (int64_t)groups * num_rows;
    t->a_scale = scales;
    t->correction = correction;
    for (int m = 0; m < num_rows && !a->are_packed; m++) {
        const float *from = a->scales + index[m] * a->scale_stride;
        const int32_t *sums = a->correction + index[m] * a->correction_stride;
        for (int g = 0; g < groups; g++) scales[g * num_rows + m] = from[g];
        for (int g = 0; g < fines; g++) {
            int32_t sum = f->fine == 16 ? sums[g] : sums[2 * g] + sums[2 * g + 1];
            float value = (float)sum;
            sum *= -f->zero;
            memcpy(correction + g * num_rows + m,
                   f->has_min ? (const void *)&value : (const void *)&sum, 4);
        }
    }
    return align_64((uint8_t *)(correction + (int64_t)fines * num_rows) + 64);
}

/* -- the kernels
 * -----------------------------------------------------------------------------------------------
 */

INLINE laid laid_at(const int FORMAT, int num_k, uint8_t *at) {
    const int fine = TRAITS[FORMAT].fine;
    if (!fine) return (laid){at, NULL, NULL};
    float *scales = (float *)(at + (int64_t)num_k * LANES);
    return (laid){at, scales, scales + (int64_t)num_k / fine * LANES};
}

INLINE void gemm(const int FORMAT, const ktk_gemm_args *args, lay_fn *lay_down,
                 fused_fn *straight) {
    const ktk_matrix *w = args->w;
    const ktk_rows *a = args->a;
    const uint8_t *panels = args->panels, *next = args->next;
    const int num_panels = args->num_panels, num_rows = args->num_rows;
    const int32_t *rows = args->rows;
    float *out = args->out;
    const int64_t out_stride = args->out_stride;
    uint8_t *work = args->work;
    const int K = w->padded_in, weights = TRAITS[FORMAT].weights;
    const int64_t panel_bytes = w->panel_bytes;
    const int num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS; /* of nearly equal height */
    const int is_fused = num_rows <= FUSED_ROWS_OF(FORMAT);
    multiply_fn *multiply = multiply_of(FORMAT);
    const int longest = num_tiles <= 2 ? SHORT_CHUNK : CHUNK, chunk = K < longest ? K : longest;
    const laid p = laid_at(FORMAT, chunk, work);
    tile tiles[MAX_TILES];
    start starts[MAX_TILES];
    work += LAID_BYTES;
    for (int t = 0, row = 0; t < num_tiles; t++) {
        const int last = (t + 1) * num_rows / num_tiles;
        tiles[t].num_rows = last - row;
        work = pack_tile(FORMAT, w, a, rows + row, last - row, work, &starts[t]);
        row = last;
    }
    for (int i = 0; i < num_panels; i++, panels += panel_bytes, out += KTK_PANEL) {
        const uint8_t *ahead = i + 1 < num_panels ? panels + panel_bytes : next;
        for (int strip = 0; strip < STRIPS; strip++) {
            const uint8_t *strip_ahead = ahead ? ahead + strip * (panel_bytes / STRIPS) : NULL;
            for (int t = 0; t < num_tiles; t++) restart(w, &starts[t], &tiles[t]);
            if (is_fused) straight(w, panels, strip, strip_ahead, tiles);
            for (int k = is_fused ? K : 0; k < K; k += chunk) {
                const int num_k = K - k < chunk ? K - k : chunk;
                lay_down(w, panels, strip, k / weights, num_k / weights, strip_ahead, p);
                for (int t = 0; t < num_tiles; t++) multiply(w, p, num_k, &tiles[t]);
            }
            float *to = out + strip * LANES;
            for (int t = 0; t < num_tiles; t++)
                for (int m = 0; m < tiles[t].num_rows; m++, to += out_stride)
                    VF_STORE(to, TRAITS[FORMAT].float_bytes
                                     ? VF_ADD(tiles[t].inner[m], tiles[t].y[m])
                                     : tiles[t].y[m]);
        }
    }
}

#define FUSED(MR, NAME, DECODE)                                                                    \
    case MR:                                                                                       \
        fused(KTK_BLOCK_##NAME, DECODE, MR, w, panel, strip, ahead, rows);                         \
        break;
#define KERNELS_OF(NAME, DECODE, GEMM_OF)                                                          \
    static void lay_##NAME(const ktk_matrix *w, const uint8_t *panel, int strip, int first,        \
                           int num_blocks, const uint8_t *ahead, laid p) {                         \
        sink s = {.to = p};                                                                        \
        run_blocks(KTK_BLOCK_##NAME, DECODE, 0, w, panel, strip, first, num_blocks, ahead, &s);    \
    }                                                                                              \
    static void fused_##NAME(const ktk_matrix *w, const uint8_t *panel, int strip,                 \
                             const uint8_t *ahead, tile *rows) {                                   \
        switch (rows->num_rows) { FUSED(1, NAME, DECODE) FUSED(2, NAME, DECODE) }                  \
        if (FUSED_ROWS_OF(KTK_BLOCK_##NAME) > 2) switch (rows->num_rows) {                         \
                FUSED(3, NAME, DECODE) FUSED(4, NAME, DECODE)                                      \
            }                                                                                      \
    }                                                                                              \
    void CAT(lf_gemm_##NAME##_, KTK_ISA)(const ktk_gemm_args *args) {                              \
        GEMM_OF(KTK_BLOCK_##NAME, args, lay_##NAME, fused_##NAME);                                 \
    }

/* Rows of a call: a panel is unpacked once for them all, but activations must stay in the L2 cache.
 * Work: a chunk as it is laid down; codes of four bytes at most, a scale for 32, a correction for
 * 16; and what lies between tiles. */
#define GEMM(NAME, CODES)                                                                          \
    [KTK_BLOCK_##NAME] = {.run = CAT(lf_gemm_##NAME##_, KTK_ISA),                                  \
                          .isa = KTK_TEXT(KTK_ISA),                                                \
                          .codes_kind = CODES,                                                     \
                          .fewest_rows = 32,                                                       \
                          .most_rows = CALL_ROWS,                                                  \
                          .rows_bytes = 256 << 10,                                                 \
                          .work = {4 * KTK_PANEL * CHUNK + 4096, 128, 4 * 32 + 4 + 8}},

#ifdef __AVX512BF16__

KERNELS_OF(bf16, NULL, gemm)

const ktk_kernels CAT(lf_blocks_, KTK_ISA) = {
    .name = KTK_TEXT(KTK_ISA),
    .gemm = {GEMM(bf16, KTK_CODES_BF16)},
};

#else

/* Of all integer formats: what differs hangs on the two functions, and one copy a format would be
 * a fifth of GCC's time. Of floats a copy each: BF16's at 16 rows is 1.8 times as fast so. */
static void gemm_integer(int format, const ktk_gemm_args *args, lay_fn *lay_down,
                         fused_fn *straight) {
    gemm(format, args, lay_down, straight);
}

#define REPACK_OF(NAME)                                                                            \
    static void repack_##NAME(const ktk_matrix *w, const uint8_t *panel, uint8_t *out) {           \
        repack(KTK_BLOCK_##NAME, w, panel, out);                                                   \
    }
#define FLOAT_ROW(NAME, ...) KERNELS_OF(NAME, NULL, gemm) REPACK_OF(NAME)
#define ROW(NAME, ...) KERNELS_OF(NAME, decode_##NAME, gemm_integer) REPACK_OF(NAME)
LF_FLOAT_FORMATS(FLOAT_ROW)
LF_INTEGER_FORMATS(ROW)
#undef ROW
#undef FLOAT_ROW

#define ROW(NAME, ...) [KTK_BLOCK_##NAME] = lay_##NAME,
static lay_fn *const LAY[KTK_NUM_FORMATS] = {LF_FLOAT_FORMATS(ROW) LF_INTEGER_FORMATS(ROW)};
#undef ROW
#define ROW(NAME, ...) [KTK_BLOCK_##NAME] = repack_##NAME,
static repack_fn *const REPACK[KTK_NUM_FORMATS] = {LF_FLOAT_FORMATS(ROW) LF_INTEGER_FORMATS(ROW)};
#undef ROW

static void repack_any(const ktk_matrix *w, const uint8_t *panel, uint8_t *out) {
    REPACK[w->format](w, panel, out);
}

static float float_of(const uint8_t *p, int format, int i) {
    if (format == KTK_BLOCK_f32) {
        float v;
        memcpy(&v, p + 4 * i, 4);
        return v;
    }
    uint16_t half;
    memcpy(&half, p + 2 * i, 2);
    if (format == KTK_BLOCK_f16) return _cvtsh_ss(half);
    uint32_t bits = (uint32_t)half << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static void unpack_any(const ktk_matrix *w, const uint8_t *panel, float *codes, float *scales,
                       float *minima, uint8_t *work) {
    const traits *t = &TRAITS[w->format];
    const int K = w->padded_in;
    for (int strip = 0; strip < STRIPS; strip++) {
        const laid p = laid_at(w->format, K, work);
        LAY[w->format](w, panel, strip, 0, K / t->weights, NULL, p);
        const int per_dword = t->float_bytes ? 4 / t->float_bytes : 4;
        for (int k = 0; k < K; k++)
            for (int n = 0; n < LANES; n++) {
                const uint8_t *at = p.codes + (int64_t)(k / per_dword) * VI_BYTES + 4 * n;
                float *to = codes + (int64_t)k * KTK_PANEL + strip * LANES + n;
                *to = t->float_bytes ? float_of(at, w->format, k % per_dword)
                                     : (float)(at[k % 4] - t->zero);
            }
        if (t->float_bytes) continue;
        for (int g = 0; g < K / t->fine; g++)
            for (int n = 0; n < LANES; n++) {
                scales[g * KTK_PANEL + strip * LANES + n] = p.scales[g * LANES + n];
                minima[g * KTK_PANEL + strip * LANES + n] =
                    t->has_min ? p.minima[g * LANES + n] : 0.0f;
            }
    }
}

/* Vector i of what lies at a dword of a strip, as fp32. */
INLINE VF value_of(int format, VI dword, int i) {
    if (format == KTK_BLOCK_f32) return VF_BITS(dword);
    if (format == KTK_BLOCK_f16) return VF_LOW_HALF(i ? VI_SRL32(dword, 16) : dword);
    return VF_BITS(i ? VI_AND(dword, VI_SET32((int)0xffff0000u)) : VI_SLL32(dword, 16));
}

enum { DECODED_K = 256 };

static void decode_strip(const ktk_matrix *w, const uint8_t *panel, int strip, int first, int num_k,
                         float *out) {
    const traits *t = &TRAITS[w->format];
    uint8_t buffer[DECODED_K * LANES * 6] __attribute__((aligned(64)));
    const laid p = laid_at(w->format, num_k, buffer);
    LAY[w->format](w, panel, strip, first / t->weights, num_k / t->weights, NULL, p);
    const int per_dword = t->float_bytes ? 4 / t->float_bytes : 4;
    const VF zero = VF_SET((float)t->zero);
    for (int k = 0; k < num_k; k += per_dword) {
        const VI dword = VI_LOAD(p.codes + k / per_dword * VI_BYTES);
        float *at = out + k * KTK_PANEL + strip * LANES;
        if (t->float_bytes) {
            for (int i = 0; i < per_dword; i++)
                VF_STORE(at + i * KTK_PANEL, value_of(w->format, dword, i));
            continue;
        }
        const int group = k / t->fine * LANES;
        const VF scale = VF_LOAD(p.scales + group);
        const VF minimum = t->has_min ? VF_LOAD(p.minima + group) : VF_ZERO();
        UNROLL
        for (int i = 0; i < 4; i++) {
            const VF code = VF_SUB(unsigned_byte(dword, i), zero);
            VF_STORE(at + i * KTK_PANEL, VF_FMA(code, scale, minimum));
        }
    }
}

static void decode_any(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                       float *out) {
    for (int k = 0; k < num_k; k += DECODED_K)
        for (int strip = 0; strip < STRIPS; strip++)
            decode_strip(w, panel, strip, first + k, num_k - k < DECODED_K ? num_k - k : DECODED_K,
                         out + k * KTK_PANEL);
}

#define FLOAT_ROW(NAME, ...) GEMM(NAME, KTK_CODES_F32)
#define ROW(NAME, ...) GEMM(NAME, KTK_CODES_I8)
#define DECODE(NAME, ...) [KTK_BLOCK_##NAME] = decode_any,
const ktk_kernels CAT(lf_blocks_, KTK_ISA) = {
    .name = KTK_TEXT(KTK_ISA),
    .gemm = {LF_FLOAT_FORMATS(FLOAT_ROW) LF_INTEGER_FORMATS(ROW)},
    .decode = {LF_FLOAT_FORMATS(DECODE) LF_INTEGER_FORMATS(DECODE)},
    .repack = repack_any,
    .unpack = unpack_any,
};

#endif
