/* y = A * B on AMX tiles for panels of bf16, whose rows of [16][2] are a B tile's as they lie. A is
 * activations rounded to bf16, packed once a call. Symbols: ktk_gemm_bf16_amxbf16.
 *
 * Tiles: 0-3 C (2 row tiles x 2 panels), 4-5 A, 6-7 B: four products for four loads. A row tile has
 * as many rows as divide evenly, at most 16. The last one may begin inside the one before it: rows
 * that are in both get the same bits from each.
 *
 * Order of a sum, for any number of rows: TDPBF16PS of 32 k after another, each of which adds its
 * even products and its odd ones apart, from +0, then both together, then that to C. So a row's
 * bits depend neither on its batch nor on the height of its tile.
 *
 * Loops: panel pairs, blocks of 512 k, row pairs, steps of 32 k. A block of B is 32 KiB: the first
 * row pair has it from L2, where the block before prefetched it to, the others from L1. A comes
 * from L2 in the order in which it lies. Between blocks C waits in memory, which is exact, and with
 * one row pair in its tiles. Rates on silicon: four products with loads from L1 65 cycles, A from
 * L2 70, A and B from L2 106 (bench/RESULTS.md). Intel SDM vol. 2, TDPBF16PS.
 *
 * No vectors here, so that the tile emulator runs this on any CPU with AVX2. */
#include <string.h>

#include "ktk_kernels.h"
#include "tiles.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    TILE_ROWS = 16,
    MAX_ROWS = 256,
    STEP_K = 32,
    ROW_BYTES = 64,                      /* of any tile */
    PANEL_STEP = STEP_K * KTK_PANEL * 2, /* bytes of a panel in a step */
    LINES = PANEL_STEP / 64,             /* of a panel in a step */
    BLOCK_STEPS = 16,                    /* of two panels 32 KiB */
    TILE_SUMS = TILE_ROWS * KTK_PANEL,   /* fp32 */
    PAIR_SUMS = 4 * TILE_SUMS,           /* of two row tiles and two panels */
    SUMS_BYTES = MAX_ROWS / 32 * 4 * PAIR_SUMS,
    /* Bytes of packed A for a row and 32 k. Tiles of equal height have up to a 16th more rows. */
    PACKED_ROW = ROW_BYTES + ROW_BYTES / TILE_ROWS,
};

/* One call. */
typedef struct {
    const ktk_gemm_args *args;
    uint8_t *packed; /* A: [row pair][step][tile of the pair][tile_rows][32] bf16 */
    float *sums;     /* C between blocks: [row pair][row tile][panel][tile_rows][16] */
    int num_tiles, tile_rows, num_pairs, num_steps;
    int64_t tile_bytes;
} gemm;

/* One row pair in one block of k of one panel pair. */
typedef struct {
    int panel, pair, step, num_steps;
    int is_first, is_last;
    const uint8_t *next; /* the block of B that comes afterwards, or NULL */
} block;

/* The row that tile t begins with. */
INLINE int first_row(const gemm *g, int t) {
    const int row = t * g->tile_rows, last = g->args->num_rows - g->tile_rows;
    return row < last ? row : last;
}

INLINE int tiles_of_pair(const gemm *g, int pair) { return g->num_tiles - 2 * pair > 1 ? 2 : 1; }

INLINE uint8_t *packed_pair(const gemm *g, int pair) {
    return g->packed + 2 * pair * g->tile_bytes * g->num_steps;
}

static void pack_rows(const gemm *g) {
    const ktk_rows *a = g->args->a;
    for (int t = 0; t < g->num_tiles; t++) {
        const int64_t step_bytes = tiles_of_pair(g, t / 2) * g->tile_bytes;
        const int32_t *rows = g->args->rows + first_row(g, t);
        for (int i = 0; i < g->tile_rows; i++) {
            const uint8_t *from = a->codes + rows[i] * a->code_stride;
            uint8_t *to = packed_pair(g, t / 2) + t % 2 * g->tile_bytes + i * ROW_BYTES;
            for (int s = 0; s < g->num_steps; s++, from += ROW_BYTES, to += step_bytes)
                memcpy(to, from, ROW_BYTES);
        }
    }
}

/* Of NP panels, to L2: the block that is read now fills L1. */
INLINE void prefetch(const int NP, const uint8_t *panel, int64_t panel_bytes, int64_t bytes) {
    for (const uint8_t *end = panel + bytes; panel < end; panel += 64) {
        __builtin_prefetch(panel, 0, 2);
        if (NP == 2) __builtin_prefetch(panel + panel_bytes, 0, 2);
    }
}

/* NT row tiles, NP panels. */
INLINE void multiply(const int NT, const int NP, const gemm *g, const block *s) {
    const ktk_gemm_args *args = g->args;
    const int64_t panel_bytes = args->w->panel_bytes, tile_bytes = g->tile_bytes;
    const uint8_t *a = packed_pair(g, s->pair) + s->step * NT * tile_bytes;
    const uint8_t *b = args->panels + s->panel * panel_bytes + (int64_t)s->step * PANEL_STEP;
    /* Of the next block each row pair fetches its share of every step. */
    const int begin = LINES * s->pair / g->num_pairs, end = LINES * (s->pair + 1) / g->num_pairs;
    const int64_t share = 64 * (end - begin);
    const uint8_t *next = s->next ? s->next + 64 * begin : NULL;
    float *const sums = g->sums + s->pair * PAIR_SUMS;
    const int is_alone = g->num_pairs == 1;
    if (s->is_first) {
        TILE_ZERO(0);
        if (NP == 2) TILE_ZERO(1);
        if (NT == 2) TILE_ZERO(2);
        if (NT == 2 && NP == 2) TILE_ZERO(3);
    } else if (!is_alone) {
        TILE_LOAD(0, sums, ROW_BYTES);
        if (NP == 2) TILE_LOAD(1, sums + TILE_SUMS, ROW_BYTES);
        if (NT == 2) TILE_LOAD(2, sums + 2 * TILE_SUMS, ROW_BYTES);
        if (NT == 2 && NP == 2) TILE_LOAD(3, sums + 3 * TILE_SUMS, ROW_BYTES);
    }
    for (int i = 0; i < s->num_steps; i++, a += NT * tile_bytes, b += PANEL_STEP) {
        TILE_LOAD(4, a, ROW_BYTES);
        TILE_LOAD(6, b, ROW_BYTES);
        TILE_DOT("tdpbf16ps", 0, 4, 6);
        if (NP == 2) {
            TILE_LOAD(7, b + panel_bytes, ROW_BYTES);
            TILE_DOT("tdpbf16ps", 1, 4, 7);
        }
        if (NT == 2) {
            TILE_LOAD(5, a + tile_bytes, ROW_BYTES);
            TILE_DOT("tdpbf16ps", 2, 5, 6);
            if (NP == 2) TILE_DOT("tdpbf16ps", 3, 5, 7);
        }
        if (!next) continue;
        prefetch(NP, next, panel_bytes, share);
        next += PANEL_STEP;
    }
    if (s->is_last) {
        const int64_t stride = 4 * args->out_stride;
        float *out =
            args->out + first_row(g, 2 * s->pair) * args->out_stride + s->panel * KTK_PANEL;
        TILE_STORE(0, out, stride);
        if (NP == 2) TILE_STORE(1, out + KTK_PANEL, stride);
        if (NT == 2) {
            out =
                args->out + first_row(g, 2 * s->pair + 1) * args->out_stride + s->panel * KTK_PANEL;
            TILE_STORE(2, out, stride);
            if (NP == 2) TILE_STORE(3, out + KTK_PANEL, stride);
        }
    } else if (!is_alone) {
        TILE_STORE(0, sums, ROW_BYTES);
        if (NP == 2) TILE_STORE(1, sums + TILE_SUMS, ROW_BYTES);
        if (NT == 2) TILE_STORE(2, sums + 2 * TILE_SUMS, ROW_BYTES);
        if (NT == 2 && NP == 2) TILE_STORE(3, sums + 3 * TILE_SUMS, ROW_BYTES);
    }
}

static void multiply_1_1(const gemm *g, const block *s) { multiply(1, 1, g, s); }
static void multiply_1_2(const gemm *g, const block *s) { multiply(1, 2, g, s); }
static void multiply_2_1(const gemm *g, const block *s) { multiply(2, 1, g, s); }
static void multiply_2_2(const gemm *g, const block *s) { multiply(2, 2, g, s); }

void ktk_gemm_bf16_amxbf16(const ktk_gemm_args *args) {
    static void (*const run[2][2])(const gemm *, const block *) = {{multiply_1_1, multiply_1_2},
                                                                   {multiply_2_1, multiply_2_2}};
    const int num_rows = args->num_rows, num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    const int tile_rows = (num_rows + num_tiles - 1) / num_tiles;
    const gemm g = {.args = args,
                    .packed = args->work + SUMS_BYTES,
                    .sums = (float *)args->work,
                    .num_tiles = num_tiles,
                    .tile_rows = tile_rows,
                    .num_pairs = (num_tiles + 1) / 2,
                    .num_steps = args->w->padded_in / STEP_K,
                    .tile_bytes = tile_rows * ROW_BYTES};
    if (!args->a->are_packed) pack_rows(&g);
    tile_configure(tile_rows, ROW_BYTES);
    const int64_t panel_bytes = args->w->panel_bytes;
    for (int panel = 0; panel < args->num_panels; panel += 2) {
        const int num_panels = args->num_panels - panel > 1 ? 2 : 1;
        for (int step = 0; step < g.num_steps; step += BLOCK_STEPS) {
            const int after = step + BLOCK_STEPS;
            block s = {.panel = panel, .step = step, .is_first = !step};
            s.is_last = after >= g.num_steps;
            s.num_steps = (s.is_last ? g.num_steps : after) - step;
            if (!s.is_last)
                s.next = args->panels + panel * panel_bytes + (int64_t)after * PANEL_STEP;
            else if (panel + 2 < args->num_panels)
                s.next = args->panels + (panel + 2) * panel_bytes;
            else
                s.next = args->next;
            for (s.pair = 0; s.pair < g.num_pairs; s.pair++)
                run[tiles_of_pair(&g, s.pair) - 1][num_panels - 1](&g, &s);
        }
    }
    TILE_RELEASE();
}

/* Rows: A of a call takes 1 MiB, half of the L2 of a CPU with tiles. */
const ktk_kernels ktk_tiles_amxbf16 = {
    .name = "amxbf16",
    .gemm = {[KTK_BF16] = {.run = ktk_gemm_bf16_amxbf16,
                           .isa = "amxbf16",
                           .codes_kind = KTK_CODES_BF16,
                           .fewest_rows = 64,
                           .most_rows = MAX_ROWS,
                           .rows_bytes = 512 * 1024,
                           .work = {SUMS_BYTES, 0, PACKED_ROW}}},
};
