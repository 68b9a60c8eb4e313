/* y = A * B on AMX tiles, for the integer formats and up to 64 rows; fewer rows go to gemm.c's
 * kernels. The floats are added in gemm.c's order, so outputs are its bits.
 *
 * Tiles: 0-3 C (2 row tiles x 2 panels), 4-5 A (row tiles), 6-7 B (panels): four products for four
 * loads. A row tile has as many rows as divide evenly, at most 16: a product takes a cycle a row.
 *
 * A fine group's sum leaves the tiles through memory, 16 stores a tile, so tile work and vector
 * work must overlap. A step is two fine groups, or one above 128 k, of one pair of row tiles and
 * one pair of panels. It goes by slices of one tile's depth: four products, then vector work that
 * they leave time for, a share of the next step's B and of reading the previous step's sums
 * (convert, scale, add). Slices, since a core looks some 500 instructions ahead and a whole group's
 * vector work is more. Order: panel pairs, steps along k, row pairs; the sums in the making (inner,
 * y) wait in memory between the steps of a row.
 *
 * B is a signed copy of the codes, of nl2 to nl4 level times multiplier, made once for all rows, in
 * one of two rooms, so that every row pair makes a share of the next. With it TDPBSSD sums need no
 * zero-point correction, which would be one more vector instruction per row and group (16 a tile,
 * against 8 per 32 k of a panel for the copy). Groups of 32 k use half of a tile's depth.
 *
 * All of `work` except A stays in L1, at most 40 KiB of it at a time: sums 16 (one group: 8), codes
 * 16, inner 8, y 8, of which groups of one size leave inner, and steps of one group half of the
 * sums. Counted instructions and what they cost, and what ran on silicon: bench/RESULTS.md. Intel
 * SDM vol. 2, TDPBSSD; Intel optimization manual, chapter 20 (a product 16 cycles, a load 8, a
 * store 16). */
#include <string.h>

#include "ktk_kernels.h"
#include "level_codes.h"
#include "tiles.h"
#include "vec.h"

enum {
    TILE_ROWS = 16,
    MAX_ROWS = 64,
    STEP_GROUPS = 2,
    STEP_K = 256,                   /* most k of a step */
    GROUP_K = STEP_K / STEP_GROUPS, /* of a group, where a step has several */
    PAIR_ROWS = 2 * TILE_ROWS,
    PANEL_CODES = STEP_K * KTK_PANEL,          /* bytes of one panel's codes in a step */
    PANEL_SUMS = PAIR_ROWS * KTK_PANEL,        /* int32 */
    GROUP_SUMS = 2 * PANEL_SUMS,               /* of both panels */
    STEP_SUMS = STEP_GROUPS * GROUP_SUMS,      /* of a step */
    STEP_SCALES = STEP_GROUPS * 2 * KTK_PANEL, /* weight scales of a step, fp32 */
    /* steps back: the next one's are made before the last one's are read */
    SCALES_KEPT = 4,
    ROW_SUMS = 2 * KTK_PANEL, /* inner or y of a row, fp32 */
};

/* Cache lines, so that every part of it starts on one. */
typedef struct {
    int32_t sums[2][STEP_SUMS];       /* of the step in the making and of the one before */
    uint8_t codes[2][2][PANEL_CODES]; /* of a step and of the next: [panel][k / 4][16][4] */
    float scales[SCALES_KEPT][STEP_SCALES];
    float inner[MAX_ROWS][ROW_SUMS];
    float y[MAX_ROWS][ROW_SUMS];
    const float *a_scales[MAX_ROWS];
} buffers;
enum { WORK_FIXED = 65536 };
_Static_assert(sizeof(buffers) + 32 * MAX_ROWS <= WORK_FIXED,
               "work must hold buffers and the padding of A");

/* One call. */
typedef struct {
    const ktk_matrix *w;
    const uint8_t *panels;
    int num_panels;
    const ktk_rows *a;
    const int32_t *rows;
    float *out;
    int64_t out_stride;
    buffers *b;
    uint8_t *packed;        /* A: [k / depth][num_tiles * tile_rows][depth] codes */
    int tile_rows;          /* of each row tile; rows past the last are zeros */
    int depth, depth_shift; /* k of one product: 32 or 64, 1 << 5 or 6 */
    int fine, num_fine, groups_per_coarse;
    int step_groups;     /* fine groups of a step */
    int slices;          /* of a fine group, each `depth` k */
    int64_t packed_step; /* bytes of A from one depth of k to the next */
} gemm;

/* Where a step is, and what reading it has to know. */
typedef struct {
    int panel, num_panels; /* 1 or 2 */
    int first_row, num_rows;
    int group, num_groups; /* fine groups */
    int ends[STEP_GROUPS]; /* the coarse group that ends with each, or -1 */
    int is_last;
    int inner_is_open; /* a coarse group goes on from the step before; ... */
    int inner_stays;   /* ... into the next */
    const uint8_t *codes;
    const int32_t *sums;
    const float *scales;
} step;

/* Rows of A side by side for every depth of k; what lies past the last row or the last k is zero.
 */
static void pack_rows(const gemm *g, int num_rows, int padded_rows) {
    const int k = g->w->padded_in;
    for (int i = 0; i < num_rows; i++) {
        const uint8_t *from = g->a->codes + g->rows[i] * g->a->code_stride;
        uint8_t *to = g->packed + (int64_t)i * g->depth;
        int at = 0;
        if (g->depth == 64)
            for (; at + 64 <= k; at += 64, to += g->packed_step)
                _mm512_store_si512(to, VI_LOAD(from + at));
        for (; at < k; at += 32, to += g->packed_step) {
            _mm256_store_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)(from + at)));
            if (g->depth == 64) _mm256_store_si256((__m256i *)(to + 32), _mm256_setzero_si256());
        }
        g->b->a_scales[i] = g->a->scales + g->rows[i] * g->a->scale_stride;
    }
    uint8_t *rest = g->packed + (int64_t)num_rows * g->depth;
    for (int at = 0; at < k; at += g->depth, rest += g->packed_step)
        memset(rest, 0, (size_t)(padded_rows - num_rows) * (size_t)g->depth);
}

INLINE __m512 weight_scale(const ktk_matrix *w, const uint8_t *panel, int group) {
    if (!w->scales_are_bf16) return VF_LOAD(panel + 64 * (int64_t)group);
    return VF_BITS(VI_SLL32(VI_BF16(panel + 32 * (int64_t)group), 16));
}

/* Both 16-bit lanes of a channel's dword: its multiplier for the 16 k from k on. */
INLINE VI multipliers_at(const int BITS, const ktk_matrix *w, const uint8_t *panel, int k) {
    if (!w->multiplier_group) return VI_SET16(1);
    const int group = w->multiplier_group == 16 ? k / 16 : k / 32;
    const __m128i pair = _mm_loadu_si128(
        (const __m128i *)(panel + KTK_PANEL * 4 + (int64_t)(group / 2) * KTK_PANEL));
    const __m128i index =
        _mm_and_si128(_mm_srl_epi16(pair, _mm_cvtsi32_si128(group % 2 * 4)), _mm_set1_epi8(15));
    const __m128i table = _mm_load_si128((const __m128i *)ktk_levels[BITS].multipliers);
    const VI words =
        _mm512_broadcast_i32x4(_mm_setr_epi32(0x01000100, 0x05040504, 0x09080908, 0x0d0c0d0c));
    return VI_SHUFFLE8(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(table, index)), words);
}

/* Level times multiplier as int8, k [begin, end), multiples of 32, of a panel.
 *
 * A 16-bit lane holds u0 + 256 u1, two k of a channel, u = level + Z. Times m, minus m Z 257, it is
 * l0 m + 256 l1 m. 128 more: the low byte borrows nothing from the high one, and differs from l0 m
 * in its top bit alone. */
INLINE void unpack_levels(const int BITS, const ktk_matrix *w, const uint8_t *panel, int begin,
                          int end, uint8_t *to) {
    const VI levels = VI_LOAD_TABLE(ktk_levels[BITS].levels), top = VI_SET16(128);
    const uint8_t *unit = panel + level_codes_at(w, BITS, begin);
    for (int k = begin; k < end; k += 32, unit += LEVEL_UNIT_BYTES * BITS) UNROLL
    for (int pair = 0; pair < 4; pair++, to += 128) {
        const VI by = multipliers_at(BITS, w, panel, k + pair / 2 * 16);
        const VI zero =
            _mm512_sub_epi16(_mm512_mullo_epi16(by, VI_SET16(KTK_LEVEL_ZERO * 257)), top);
        VI code[2];
        level_pair(BITS, unit, pair, 0, &code[0], &code[1]);
        UNROLL
        for (int i = 0; i < 2; i++) {
            const VI u = VI_SHUFFLE8(levels, code[i]);
            const VI product = _mm512_sub_epi16(_mm512_mullo_epi16(u, by), zero);
            _mm512_store_si512(to + 64 * i, _mm512_xor_si512(product, top));
        }
    }
}

/* Signed codes of k [begin, end) of a panel. */
static void unpack_codes(const ktk_matrix *w, const uint8_t *panel, int begin, int end,
                         uint8_t *to) {
    const uint8_t *from = panel + w->code_offset;
    if (w->format == KTK_NL2) {
        unpack_levels(2, w, panel, begin, end, to);
    } else if (w->format == KTK_NL3) {
        unpack_levels(3, w, panel, begin, end, to);
    } else if (w->format == KTK_NL4) {
        unpack_levels(4, w, panel, begin, end, to);
    } else if (w->format == KTK_INT8) {
        const VI sign = VI_SET8((char)128);
        from += (int64_t)begin * KTK_PANEL;
        for (int at = begin; at < end; at += 32, from += 512, to += 512) UNROLL
        for (int i = 0; i < 512; i += 64)
            _mm512_store_si512(to + i, _mm512_xor_si512(VI_LOAD(from + i), sign));
    } else {
        const VI mask = VI_SET8(15), zero = VI_SET8(8);
        from += (int64_t)begin * KTK_PANEL / 2;
        for (int at = begin; at < end; at += 32, from += 256, to += 512) UNROLL
        for (int i = 0; i < 256; i += 64) {
            VI v = VI_LOAD(from + i);
            _mm512_store_si512(to + 2 * i, _mm512_sub_epi8(VI_AND(v, mask), zero));
            _mm512_store_si512(to + 2 * i + 64,
                               _mm512_sub_epi8(VI_AND(VI_SRL16(v, 4), mask), zero));
        }
    }
}

/* Where a step's B goes. */
typedef struct {
    int panel, group, num_groups; /* num_groups 0: there is no step */
    uint8_t (*codes)[PANEL_CODES];
    float *scales;
} room;

/* Share `share` of `shares` of a slice of B; with the first slice of a group its fine scales. */
static void unpack_slice(const gemm *g, const room *to, int slice, int share, int shares) {
    const ktk_matrix *w = g->w;
    const int place = slice / g->slices, at = slice % g->slices * g->depth;
    if (place >= to->num_groups) return;
    const int start = (to->group + place) * g->fine + at;
    const int left = g->fine - at < w->padded_in - start ? g->fine - at : w->padded_in - start;
    const int k = left < g->depth ? left : g->depth;
    const int begin = k * share / shares & -32;
    const int end = share + 1 == shares ? k : k * (share + 1) / shares & -32;
    for (int p = 0; p < 2 && to->panel + p < g->num_panels; p++) {
        const uint8_t *from = g->panels + (to->panel + p) * w->panel_bytes;
        if (!at && !share)
            VF_STORE(to->scales + (2 * place + p) * KTK_PANEL,
                     w->group_size == g->fine ? weight_scale(w, from, to->group + place)
                                              : VF_ZERO());
        unpack_codes(w, from, start + begin, start + end,
                     to->codes[p] + (place * GROUP_K + at + begin) * KTK_PANEL);
    }
}

/* Products of a slice of a step. Sums of a fine group begin with its first slice, and go through
 * the tiles to memory, [panel][row][16], with its last. Codes past a group that ends within a depth
 * are left over from before; A is zero there. */
static void multiply_slice(const gemm *g, const step *s, int slice) {
    const int place = slice / g->slices, at = slice % g->slices * g->depth;
    const int begin = (s->group + place) * g->fine;
    const int left = g->w->padded_in - begin, k = left < g->fine ? left : g->fine;
    if (place >= s->num_groups || at >= k) return;
    const int depth = g->depth, tile_rows = g->tile_rows, two_panels = s->num_panels == 2;
    const int two_tiles = s->num_rows > tile_rows;
    const int64_t tile_bytes = (int64_t)tile_rows * depth;
    const uint8_t *a = g->packed + ((begin + at) >> g->depth_shift) * g->packed_step +
                       (int64_t)s->first_row * depth;
    const uint8_t *b = s->codes + (place * GROUP_K + at) * KTK_PANEL;
    if (!at) {
        TILE_ZERO(0);
        if (two_panels) TILE_ZERO(1);
        if (two_tiles) TILE_ZERO(2);
        if (two_tiles && two_panels) TILE_ZERO(3);
    }
    TILE_LOAD(4, a, depth);
    TILE_LOAD(6, b, 64);
    TILE_DOT("tdpbssd", 0, 4, 6);
    if (two_panels) {
        TILE_LOAD(7, b + PANEL_CODES, 64);
        TILE_DOT("tdpbssd", 1, 4, 7);
    }
    if (two_tiles) {
        TILE_LOAD(5, a + tile_bytes, depth);
        TILE_DOT("tdpbssd", 2, 5, 6);
        if (two_panels) TILE_DOT("tdpbssd", 3, 5, 7);
    }
    if (at + depth < k) return;
    int32_t *to = (int32_t *)s->sums + place * GROUP_SUMS;
    TILE_STORE(0, to, 64);
    if (two_panels) TILE_STORE(1, to + PANEL_SUMS, 64);
    if (!two_tiles) return;
    to += tile_rows * KTK_PANEL;
    TILE_STORE(2, to, 64);
    if (two_panels) TILE_STORE(3, to + PANEL_SUMS, 64);
}

enum { READ_ROWS = 8 };

/* inner += sum * fine scale, for `run` fine groups from the step's group u on. Array sizes are
 * constants: with [MR] they would be variable to the compiler, which then leaves them in memory. */
INLINE void add_groups(const int MR, const int NP, const int WEIGHT_IS_FINE, const int run,
                       const gemm *g, const step *s, int i, int u, VF inner[2][READ_ROWS]) {
    const int32_t *sums = s->sums + u * GROUP_SUMS + i * KTK_PANEL;
    const float *const *a_scales = g->b->a_scales + s->first_row + i;
    /* Hides where both come from, so that what they point at is loaded where it is used: hoisted
     * out of the branches around this, it does not fit the registers. */
    __asm__ volatile("" : "+r"(a_scales), "+r"(sums));
    VF scale[STEP_GROUPS][2];
    for (int v = 0; v < run; v++) UNROLL
    for (int p = 0; p < NP; p++)
        scale[v][p] =
            WEIGHT_IS_FINE ? VF_LOAD(s->scales + (2 * (u + v) + p) * KTK_PANEL) : VF_ZERO();
    UNROLL
    for (int m = 0; m < MR; m++) {
        const float *a_scale = WEIGHT_IS_FINE ? NULL : a_scales[m] + s->group + u;
        UNROLL
        for (int v = 0; v < run; v++) {
            if (!WEIGHT_IS_FINE) scale[v][0] = scale[v][1] = VF_SET(a_scale[v]);
            UNROLL
            for (int p = 0; p < NP; p++) {
                VI sum = VI_LOAD(sums + v * GROUP_SUMS + p * PANEL_SUMS + m * KTK_PANEL);
                inner[p][m] = VF_FMA(VF_CVT(sum), scale[v][p], inner[p][m]);
            }
        }
    }
}

/* y += inner * coarse scale, in memory: with y in registers too, eight rows of inner would not fit.
 */
INLINE void add_inner(const int MR, const int NP, const int WEIGHT_IS_FINE, const gemm *g,
                      const step *s, int i, int coarse, VF inner[2][READ_ROWS]) {
    const float *const *a_scales = g->b->a_scales + s->first_row + i;
    float *y = g->b->y[s->first_row + i];
    VF scale[2] = {VF_ZERO(), VF_ZERO()};
    if (!WEIGHT_IS_FINE) UNROLL
    for (int p = 0; p < NP; p++)
        scale[p] = weight_scale(g->w, g->panels + (s->panel + p) * g->w->panel_bytes, coarse);
    UNROLL
    for (int m = 0; m < MR; m++, y += ROW_SUMS) {
        if (WEIGHT_IS_FINE) scale[0] = scale[1] = VF_SET(a_scales[m][coarse]);
        UNROLL
        for (int p = 0; p < NP; p++) {
            VF sum = coarse ? VF_LOAD(y + p * KTK_PANEL) : VF_ZERO();
            VF_STORE(y + p * KTK_PANEL, VF_FMA(inner[p][m], scale[p], sum));
            inner[p][m] = VF_ZERO();
        }
    }
}

/* MR rows from row i of a step, NP panels. */
INLINE void read_rows(const int MR, const int NP, const int WEIGHT_IS_FINE, const gemm *g,
                      const step *s, int i) {
    float *const kept = g->b->inner[s->first_row + i];
    VF inner[2][READ_ROWS];
    UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int p = 0; p < NP; p++)
        inner[p][m] = s->inner_is_open ? VF_LOAD(kept + m * ROW_SUMS + p * KTK_PANEL) : VF_ZERO();
    for (int u = 0; u < s->num_groups; u++) {
        if (u + 1 < s->num_groups && s->ends[u] < 0)
            add_groups(MR, NP, WEIGHT_IS_FINE, 2, g, s, i, u++, inner);
        else
            add_groups(MR, NP, WEIGHT_IS_FINE, 1, g, s, i, u, inner);
        if (s->ends[u] >= 0) add_inner(MR, NP, WEIGHT_IS_FINE, g, s, i, s->ends[u], inner);
    }
    if (s->inner_stays) UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int p = 0; p < NP; p++) VF_STORE(kept + m * ROW_SUMS + p * KTK_PANEL, inner[p][m]);
    if (s->is_last) UNROLL
    for (int m = 0; m < MR; m++) UNROLL
    for (int p = 0; p < NP; p++)
        VF_STORE(g->out + (s->first_row + i + m) * g->out_stride + (s->panel + p) * KTK_PANEL,
                 VF_LOAD(g->b->y[s->first_row + i + m] + p * KTK_PANEL));
}

/* Eight rows of two panels: 16 chains of FMAs, and half the registers left for what they need. */
#define READ_ALL(NP, FINE)                                                                         \
    static void read_##NP##_##FINE(const gemm *g, const step *s, int i, int end) {                 \
        for (; i + 8 <= end; i += 8) read_rows(8, NP, FINE, g, s, i);                              \
        for (; i + 2 <= end; i += 2) read_rows(2, NP, FINE, g, s, i);                              \
        for (; i < end; i++) read_rows(1, NP, FINE, g, s, i);                                      \
    }
READ_ALL(1, 0)
READ_ALL(1, 1)
READ_ALL(2, 0)
READ_ALL(2, 1)

/* Part `part` of `parts` of a step's rows. */
static void read_part(const gemm *g, const step *s, int part, int parts) {
    static void (*const read[2][2])(const gemm *, const step *, int, int) = {{read_1_0, read_1_1},
                                                                             {read_2_0, read_2_1}};
    int size = ((s->num_rows + parts - 1) / parts + READ_ROWS - 1) & ~(READ_ROWS - 1);
    int begin = part * size, end = part == parts - 1 ? s->num_rows : begin + size;
    if (end > s->num_rows) end = s->num_rows;
    if (begin < end) read[s->num_panels - 1][g->w->group_size == g->fine](g, s, begin, end);
}

/* The step at a panel and a group; rows, sums and scales are still to be said. */
static step make_step(const gemm *g, int panel, int group) {
    step s = {.panel = panel, .group = group};
    s.num_panels = g->num_panels - panel > 1 ? 2 : 1;
    s.num_groups = g->num_fine - group < g->step_groups ? g->num_fine - group : g->step_groups;
    s.is_last = group + s.num_groups == g->num_fine;
    int coarse = group / g->groups_per_coarse, place = group % g->groups_per_coarse;
    s.inner_is_open = place != 0;
    for (int u = 0; u < s.num_groups; u++) {
        const int ends = ++place == g->groups_per_coarse || group + u + 1 == g->num_fine;
        s.ends[u] = ends ? coarse : -1;
        if (ends) coarse++, place = 0;
    }
    s.inner_stays = place != 0;
    return s;
}

static void gemm_tiles(const ktk_gemm_args *args) {
    const ktk_matrix *w = args->w;
    const int num_rows = args->num_rows, num_panels = args->num_panels;
    const int num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    gemm g = {.w = w,
              .panels = args->panels,
              .num_panels = num_panels,
              .a = args->a,
              .rows = args->rows,
              .out = args->out,
              .out_stride = args->out_stride,
              .b = (buffers *)args->work,
              .packed = args->work + sizeof(buffers)};
    g.fine = w->group_size < w->activation_group ? w->group_size : w->activation_group;
    const int coarse = w->group_size < w->activation_group ? w->activation_group : w->group_size;
    g.num_fine = (w->padded_in + g.fine - 1) / g.fine;
    g.groups_per_coarse = (coarse + g.fine - 1) / g.fine;
    g.depth_shift = g.fine % 64 && g.num_fine > 1 ? 5 : 6;
    g.depth = 1 << g.depth_shift;
    g.step_groups = g.fine > GROUP_K ? 1 : STEP_GROUPS;
    g.slices = (g.fine + g.depth - 1) / g.depth;
    g.tile_rows = (num_rows + num_tiles - 1) / num_tiles;
    const int padded_rows = num_tiles * g.tile_rows;
    g.packed_step = (int64_t)padded_rows * g.depth;
    pack_rows(&g, num_rows, padded_rows);
    tile_configure(g.tile_rows, g.depth);

    const int num_slices = g.step_groups * g.slices;
    const int num_pairs = (num_rows + 2 * g.tile_rows - 1) / (2 * g.tile_rows);
    int steps = 0, parity = 0;
    step made[2] = {{0}}, *s = &made[0], *last = &made[1]; /* last: made, not yet read */
    const room first = {0, 0, make_step(&g, 0, 0).num_groups, g.b->codes[0], g.b->scales[0]};
    for (int slice = 0; slice < num_slices; slice++) unpack_slice(&g, &first, slice, 0, 1);
    for (int panel = 0; panel < num_panels; panel += 2)
        for (int group = 0; group < g.num_fine; group += g.step_groups, steps++) {
            const step here = make_step(&g, panel, group);
            room next = {panel, group + g.step_groups, 0, g.b->codes[(steps + 1) % 2],
                         g.b->scales[(steps + 1) % SCALES_KEPT]};
            if (next.group >= g.num_fine) next.panel += 2, next.group = 0;
            if (next.panel < num_panels)
                next.num_groups = make_step(&g, next.panel, next.group).num_groups;
            for (int pair = 0; pair < num_pairs; pair++, parity ^= 1) {
                *s = here;
                s->codes = g.b->codes[steps % 2][0];
                s->scales = g.b->scales[steps % SCALES_KEPT];
                s->first_row = pair * 2 * g.tile_rows;
                s->num_rows = num_rows - s->first_row < 2 * g.tile_rows ? num_rows - s->first_row
                                                                        : 2 * g.tile_rows;
                s->sums = g.b->sums[parity];
                for (int slice = 0; slice < num_slices; slice++) {
                    multiply_slice(&g, s, slice);
                    unpack_slice(&g, &next, slice, pair, num_pairs);
                    if (last->num_rows) read_part(&g, last, slice, num_slices);
                }
                step *swap = last;
                last = s;
                s = swap;
            }
        }
    read_part(&g, last, 0, 1);
    TILE_RELEASE();
}

/* By counted instructions tiles are ahead from 4 rows with groups of 128 k, from 7 with groups of
 * 32; the whole tile of 8 rows stays in gemm.c, where the count is close and needs no model of a
 * CPU nobody measured. */
enum { TILE_MIN_ROWS = 9 };
#define TILES_FROM_9(NAME)                                                                         \
    ktk_gemm_fn ktk_gemm_##NAME##_avx512vnni;                                                      \
    void ktk_gemm_##NAME##_amx(const ktk_gemm_args *args) {                                        \
        (args->num_rows >= TILE_MIN_ROWS ? gemm_tiles : ktk_gemm_##NAME##_avx512vnni)(args);       \
    }
TILES_FROM_9(nl2)
TILES_FROM_9(nl3)
TILES_FROM_9(nl4)
TILES_FROM_9(int4)
TILES_FROM_9(int8)

#define GEMM(NAME)                                                                                 \
    {.run = NAME,                                                                                  \
     .isa = "amx",                                                                                 \
     .codes_kind = KTK_CODES_I8,                                                                   \
     .fewest_rows = MAX_ROWS,                                                                      \
     .most_rows = MAX_ROWS,                                                                        \
     .work = {WORK_FIXED, 0, 128}}
const ktk_kernels ktk_tiles_amx = {
    .name = "amx",
    .gemm = {[KTK_NL2] = GEMM(ktk_gemm_nl2_amx),
             [KTK_NL3] = GEMM(ktk_gemm_nl3_amx),
             [KTK_NL4] = GEMM(ktk_gemm_nl4_amx),
             [KTK_INT4] = GEMM(ktk_gemm_int4_amx),
             [KTK_INT8] = GEMM(ktk_gemm_int8_amx)},
};
