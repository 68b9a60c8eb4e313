/* The weight quantiser of one ISA row: searched scales for a panel of 16 channels, one channel a
 * lane.
 *
 * Same operations in the same order as ktk/reference/pack.py: sums run over k, no FMA, so every row
 * (and Numba and NumPy) finds the same codes. A candidate costs 9 vector operations per k, bound by
 * the two multiply ports.
 *
 * Symbols: ktk_pack_panel_avx2 ktk_pack_panel_avx512 ktk_pack_panel_avx512vnni. */
#include <string.h>

#include "ktk_kernels.h"
#include "row.h"
#include "vec.h"

enum { L = 16 };

static const float MAGIC =
    12582912.0f; /* 1.5 * 2^23: adding and subtracting rounds half to even below 2^22 */
/* a group whose weights are all smaller is stored as zeros */
static const float TINY_PEAK = 1e-30f;

typedef struct {
    VF v[PV];
} lanes; /* 16 channels */

#define EACH                                                                                       \
    UNROLL                                                                                         \
    for (int i = 0; i < PV; i++)

INLINE lanes load_lanes(const float *p) {
    lanes x;
    EACH x.v[i] = VF_LOAD(p + i * LANES);
    return x;
}
INLINE void store_lanes(float *p, lanes x) { EACH VF_STORE(p + i * LANES, x.v[i]); }
INLINE lanes set_lanes(float f) {
    lanes x;
    EACH x.v[i] = VF_SET(f);
    return x;
}

typedef struct {
    VF low, high, magic;
    int is_bf16_scale;
} code_range;

INLINE VF to_code(VF x, VF inverse, const code_range *c) {
    VF q = VF_SUB(VF_ADD(VF_MUL(x, inverse), c->magic), c->magic);
    return VF_MIN(VF_MAX(q, c->low), c->high);
}

/* 1 / scale, 0 for 0. */
INLINE lanes invert(lanes scale) {
    lanes inverse;
    EACH inverse.v[i] = VF_WHERE_0(scale.v[i], VF_ZERO(), VF_DIV(VF_SET(1.0f), scale.v[i]));
    return inverse;
}

/* Finite float32 rounded half to even to bf16 precision. */
INLINE VF round_bf16(VF x) {
    VI b = VI_BITS(x);
    VI odd = VI_AND(VI_SRL32(b, 16), VI_SET32(1));
    return VF_BITS(VI_AND(VI_ADD32(VI_ADD32(b, VI_SET32(0x7fff)), odd), VI_SET32((int)0xffff0000)));
}

/* What a group's candidates are judged by: weights relative to the peak, so that no square over- or
 * underflows. */
typedef struct {
    const float *x; /* [k][16] */
    int k0, k1;
    lanes inverse_peak, mean_square; /* of the relative weights */
} group_view;

/* Keeps the candidate where the group's error, each weight's square counted (relative weight^2 +
 * mean square) times, is less than the best one's: large weights matter more, and plain squares
 * would clip them. */
INLINE void judge(const group_view *g, const code_range *c, lanes scale, lanes *best,
                  lanes *best_error) {
    if (c->is_bf16_scale) EACH scale.v[i] = round_bf16(scale.v[i]);
    lanes inverse = invert(scale), relative, sum = set_lanes(0.0f);
    EACH relative.v[i] = VF_MUL(scale.v[i], g->inverse_peak.v[i]);
    for (int k = g->k0; k < g->k1; k++) EACH {
            VF v = VF_LOAD(g->x + k * L + i * LANES);
            VF n = VF_MUL(v, g->inverse_peak.v[i]);
            VF e = VF_SUB(n, VF_MUL(to_code(v, inverse.v[i], c), relative.v[i]));
            VF weight = VF_ADD(VF_MUL(n, n), g->mean_square.v[i]);
            sum.v[i] = VF_ADD(sum.v[i], VF_MUL(weight, VF_MUL(e, e)));
        }
    EACH best->v[i] = VF_WHERE_LT(sum.v[i], best_error->v[i], scale.v[i], best->v[i]);
    EACH best_error->v[i] = VF_MIN(sum.v[i], best_error->v[i]);
}

/* The scale, relative to the peak, of least such error for the codes that ``scale`` gives. */
INLINE lanes refit(const group_view *g, const code_range *c, lanes scale) {
    lanes inverse = invert(scale), up = set_lanes(0.0f), down = set_lanes(0.0f);
    for (int k = g->k0; k < g->k1; k++) EACH {
            VF v = VF_LOAD(g->x + k * L + i * LANES);
            VF n = VF_MUL(v, g->inverse_peak.v[i]);
            VF q = to_code(v, inverse.v[i], c);
            VF weight = VF_ADD(VF_MUL(n, n), g->mean_square.v[i]);
            up.v[i] = VF_ADD(up.v[i], VF_MUL(VF_MUL(weight, n), q));
            down.v[i] = VF_ADD(down.v[i], VF_MUL(VF_MUL(weight, q), q));
        }
    EACH scale.v[i] = VF_WHERE_0(down.v[i], VF_ZERO(), VF_DIV(up.v[i], down.v[i]));
    return scale;
}

/* 16 rows to x[padded_in][16], zero padded. Returns 1 if a weight is NaN or inf. */
static int transpose(const ktk_matrix *w, int in_features, const void *const *src, int src_is_bf16,
                     float *x) {
    uint32_t most = 0;
    memset(x, 0, sizeof(float) * (size_t)w->padded_in * L);
    for (int l = 0; l < L; l++) {
        if (!src[l]) continue;
        const uint16_t *half = src[l];
        const uint32_t *full = src[l];
        uint32_t *to = (uint32_t *)x + l;
        for (int k = 0; k < in_features; k++) {
            uint32_t bits = src_is_bf16 ? (uint32_t)half[k] << 16 : full[k];
            uint32_t magnitude = bits & 0x7fffffffu;
            most = magnitude > most ? magnitude : most;
            to[k * L] = bits;
        }
    }
    return most >= 0x7f800000u;
}

int CAT(ktk_pack_panel_, KTK_ISA)(const ktk_matrix *w, int in_features, const void *const *src,
                                  int src_is_bf16, const float *ladder, int num_ladder, int refits,
                                  float *work, uint8_t *panel) {
    const int num_k = w->padded_in, is_int8 = w->format == KTK_INT8, zero_point = is_int8 ? 128 : 8;
    const code_range c = {VF_SET(is_int8 ? -127.0f : -8.0f), VF_SET(is_int8 ? 127.0f : 7.0f),
                          VF_SET(MAGIC), w->scales_are_bf16};
    float *x = work;                                /* [padded_in][16] */
    uint8_t *codes = (uint8_t *)(work + num_k * L); /* [padded_in][16] */
    uint8_t *scales = panel, *stored_codes = panel + w->code_offset;
    if (transpose(w, in_features, src, src_is_bf16, x)) return 1;
    for (int g = 0; g * w->group_size < num_k; g++) {
        const int k0 = g * w->group_size,
                  k1 = k0 + w->group_size < num_k ? k0 + w->group_size : num_k;
        lanes peak = set_lanes(0.0f), best, best_error = set_lanes(__builtin_inff());
        const VF magnitude = VF_BITS(VI_SET32(0x7fffffff));
        for (int k = k0; k < k1; k++)
            EACH peak.v[i] = VF_MAX(
                peak.v[i],
                VF_BITS(VI_AND(VI_BITS(VF_LOAD(x + k * L + i * LANES)), VI_BITS(magnitude))));
        EACH peak.v[i] = VF_WHERE_LT(peak.v[i], VF_SET(TINY_PEAK), VF_ZERO(), peak.v[i]);
        group_view view = {x, k0, k1, invert(peak), set_lanes(0.0f)};
        for (int k = k0; k < k1; k++) EACH {
                VF n = VF_MUL(VF_LOAD(x + k * L + i * LANES), view.inverse_peak.v[i]);
                view.mean_square.v[i] = VF_ADD(view.mean_square.v[i], VF_MUL(n, n));
            }
        EACH view.mean_square.v[i] = VF_DIV(view.mean_square.v[i], VF_SET((float)(k1 - k0)));
        /* stands where every error overflows */
        EACH best.v[i] = VF_DIV(peak.v[i], VF_SET(ladder[0]));
        if (c.is_bf16_scale) EACH best.v[i] = round_bf16(best.v[i]);
        for (int s = 0; s < num_ladder + refits; s++) {
            lanes scale;
            if (s < num_ladder)
                EACH scale.v[i] = VF_DIV(peak.v[i], VF_SET(ladder[s]));
            else {
                scale = refit(&view, &c, best);
                EACH scale.v[i] = VF_MUL(scale.v[i], peak.v[i]);
            }
            judge(&view, &c, scale, &best, &best_error);
        }
        float stored[L], code[L];
        store_lanes(stored, best);
        for (int l = 0; l < L; l++) {
            if (w->scales_are_bf16) /* little-endian upper half */
                memcpy(scales + 2 * (g * L + l), (uint8_t *)&stored[l] + 2, 2);
            else
                memcpy(scales + 4 * (g * L + l), &stored[l], 4);
        }
        lanes inverse = invert(best);
        for (int k = k0; k < k1; k++) {
            lanes q = load_lanes(x + k * L);
            EACH q.v[i] = to_code(q.v[i], inverse.v[i], &c);
            store_lanes(code, q);
            for (int l = 0; l < L; l++) codes[k * L + l] = (uint8_t)((int32_t)code[l] + zero_point);
        }
    }
    for (int k = 0; k < num_k; k++)
        for (int l = 0; l < L; l++) {
            uint8_t q = codes[k * L + l];
            if (is_int8) {
                stored_codes[(k / 4) * 64 + l * 4 + k % 4] = q;
            } else {
                uint8_t *at = stored_codes + (k / 8) * 64 + l * 4 + k % 4;
                *at = k % 8 < 4 ? q : (uint8_t)(*at | q << 4);
            }
        }
    return 0;
}
