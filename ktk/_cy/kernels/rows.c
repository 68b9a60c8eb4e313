/* Elementwise kernels of one ISA row: activation quantisation, the activation function, dtype
 * conversion, sums. Every operation is IEEE and stands in the order ktk/reference states, so all
 * rows agree bit for bit.
 *
 * maxps(low, x) and minps(high, x) give x where it is NaN: the operands stand so that a NaN is
 * kept.
 *
 * Symbols: ktk_rotate_avx2 ktk_rotate_avx512 ktk_rotate_avx512vnni
 *   ktk_rotate_back_avx2 ktk_rotate_back_avx512 ktk_rotate_back_avx512vnni
 *   ktk_activate_back_avx2 ktk_activate_back_avx512 ktk_activate_back_avx512vnni
 *   ktk_drop_avx2 ktk_drop_avx512 ktk_drop_avx512vnni
 *   ktk_quantise_avx2 ktk_quantise_avx512 ktk_quantise_avx512vnni ktk_activate_avx2
 *   ktk_activate_avx512 ktk_activate_avx512vnni ktk_load_avx2 ktk_load_avx512 ktk_load_avx512vnni
 *   ktk_store_avx2 ktk_store_avx512 ktk_store_avx512vnni ktk_combine_avx2 ktk_combine_avx512
 *   ktk_combine_avx512vnni ktk_add_avx2 ktk_add_avx512 ktk_add_avx512vnni. */
#include <math.h>
#include <string.h>

#include "exp.h"
#include "ktk_kernels.h"
#include "row.h"
#include "vec.h"

enum { STEPS = 16 / LANES }; /* vectors of 16 lanes */

INLINE float float_of(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

/* below it 127 / amax overflows: the group counts as zero */
static const float TINY_AMAX = 1.5e-36f;
static const uint32_t INF_BITS = 0x7f800000u;

static const float TINY_PLANES = 3.5e-34f; /* likewise of KTK_PLANES_MOST / amax */

INLINE __m128i narrowed(const VI q[STEPS]) {
#ifdef __AVX512F__
    return _mm512_cvtepi32_epi8(q[0]);
#else
    const __m256i wide = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#endif
}

/* Sixteen codes at index i, a multiple of 16. */
INLINE void store_planes(ktk_planes *groups, int i, const VI q[STEPS]) {
    ktk_planes *to = groups + i / KTK_PLANES_K;
    const int first = i % KTK_PLANES_K;
    VI high[STEPS], low[STEPS];
    UNROLL
    for (int v = 0; v < STEPS; v++) {
        const VF code = VF_CVT(q[v]);
        VF_STORE(to->codes + first + v * LANES, code);
        high[v] = VI_ROUND(VF_MUL(code, VF_SET(1.0f / KTK_PLANE_BASE)));
        low[v] = VI_SUB32(q[v], VI_MUL32(high[v], VI_SET32(KTK_PLANE_BASE)));
    }
    const __m128i h = narrowed(high), l = narrowed(low);
    _mm_storeu_si128((__m128i *)to->planes[first / 4], _mm_unpacklo_epi32(h, l));
    _mm_storeu_si128((__m128i *)to->planes[first / 4 + 2], _mm_unpackhi_epi32(h, l));
}

/* Sixteen codes at index i. */
INLINE void store_codes(int codes_kind, uint8_t *codes, int i, const VI q[STEPS]) {
    if (codes_kind == KTK_CODES_PLANES) {
        store_planes((ktk_planes *)codes, i, q);
        return;
    }
#ifdef __AVX512F__
    __m256i wide = _mm512_cvtepi32_epi16(q[0]);
#else
    __m256i wide = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
#endif
    if (codes_kind == KTK_CODES_I8) {
        _mm_storeu_si128((__m128i *)(codes + i), narrowed(q));
    } else { /* k order 0 2 1 3 */
        wide = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(wide, 0xd8), 0xd8);
        _mm256_storeu_si256((__m256i *)(codes + 2 * i), wide);
    }
}

void CAT(ktk_quantise_, KTK_ISA)(const float *x, int n, int group, int fine, int zero_point,
                                 int codes_kind, uint8_t *codes, float *scales,
                                 int32_t *correction) {
    const VI magnitude_bits = VI_SET32(0x7fffffff);
    const int is_planes = codes_kind == KTK_CODES_PLANES;
    const float levels = is_planes ? KTK_PLANES_MOST : 127,
                tiny = is_planes ? TINY_PLANES : TINY_AMAX;
    const int32_t kept = zero_point == KTK_LEVEL_ZERO ? 0xffff : -1;
    for (int g = 0, f_index = 0; g * group < n; g++) {
        const int begin = g * group, end = begin + group < n ? begin + group : n;
        VI most = VI_ZERO();
        for (int i = begin; i < end; i += LANES)
            most = VI_MAX_U32(most, VI_AND(VI_LOAD(x + i), magnitude_bits));
        const uint32_t magnitude = VI_REDUCE_MAX_U32(most);
        float amax = float_of(magnitude), inverse = 0.0f, scale = 0.0f;
        if (magnitude >= INF_BITS) {
            scale = float_of(0x7fc00000u);
        } else if (amax >= tiny) {
            inverse = levels / amax;
            scale = amax / levels;
        }
        scales[g] = scale;
        for (int f = begin; f < end; f += fine, f_index++) {
            const int f_end = f + fine < end ? f + fine : end;
            VI sum = VI_ZERO();
            for (int i = f; i < f_end; i += 16) {
                VI q[STEPS];
                UNROLL
                for (int v = 0; v < STEPS; v++) {
                    q[v] = VI_ZERO(); /* not 0 * x: x may be NaN */
                    if (inverse != 0.0f)
                        q[v] = VI_ROUND(VF_MUL(VF_LOAD(x + i + v * LANES), VF_SET(inverse)));
                    sum = VI_ADD32(sum, q[v]);
                }
                store_codes(codes_kind, codes, i, q);
            }
            correction[f_index] = (-zero_point * VI_REDUCE_ADD32(sum)) & kept;
        }
    }
}

/* Signs of 64 columns: splitmix64 (Steele, Lea, Flood 2014) of the seed and the word's place. */
static uint64_t sign_word(uint32_t seed, int64_t word) {
    uint64_t z = ((uint64_t)seed << 32) + (uint64_t)word + 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Butterflies of neighbours 1, 2, 4 (and 8) apart: of each pair (a + b, a - b). */
INLINE VF turn_within(VF x) {
#ifdef __AVX512F__
#define STEP(A, B, LANES_OF_B) x = _mm512_mask_sub_ps(_mm512_add_ps(A, B), LANES_OF_B, A, B)
    STEP(_mm512_moveldup_ps(x), _mm512_movehdup_ps(x), 0xaaaa);
    STEP(_mm512_permute_ps(x, 0x44), _mm512_permute_ps(x, 0xee), 0xcccc);
    STEP(_mm512_shuffle_f32x4(x, x, 0xa0), _mm512_shuffle_f32x4(x, x, 0xf5), 0xf0f0);
    STEP(_mm512_shuffle_f32x4(x, x, 0x44), _mm512_shuffle_f32x4(x, x, 0xee), 0xff00);
#undef STEP
#else
    VF a = _mm256_moveldup_ps(x), b = _mm256_movehdup_ps(x);
    x = _mm256_blend_ps(VF_ADD(a, b), VF_SUB(a, b), 0xaa);
    a = _mm256_permute_ps(x, 0x44), b = _mm256_permute_ps(x, 0xee);
    x = _mm256_blend_ps(VF_ADD(a, b), VF_SUB(a, b), 0xcc);
    a = _mm256_permute2f128_ps(x, x, 0x00), b = _mm256_permute2f128_ps(x, x, 0x11);
    x = _mm256_blend_ps(VF_ADD(a, b), VF_SUB(a, b), 0xf0);
#endif
    return x;
}

/* A lane's sign changes where its bit, from the lowest on, is set. */
INLINE VF with_signs(VF x, uint64_t signs) {
#ifdef __AVX512F__
    const VI lane =
        _mm512_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16);
#else
    const VI lane = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
#endif
    const VI bits = VI_SLLV32(VI_SET32((int32_t)(uint32_t)signs), lane);
    return VF_BITS(VI_XOR(VI_BITS(x), VI_AND(bits, VI_SET32(INT32_MIN))));
}

/* Columns change their signs and are turned; back: they are turned, which undoes itself, and then
 * change their signs. */
INLINE void turn(const int IS_BACK, float *x, int64_t first, int n, int width, uint32_t seed) {
    const VF scale = VF_SET(width == 64 ? 0.125f : 0.0625f);
    for (int block = 0; block < n; block += width) {
        float *const b = x + block;
        for (int word = 0; word < width; word += 64) {
            const uint64_t signs = sign_word(seed, (first + block + word) / 64);
            UNROLL
            for (int i = 0; i < 64; i += LANES) {
                float *at = b + word + i;
                const VF value = VF_LOAD(at);
                VF_STORE(at, turn_within(IS_BACK ? value : with_signs(value, signs >> i)));
            }
        }
        for (int step = LANES; step < width; step *= 2)
            for (int i = 0; i < width; i += 2 * step)
                for (int j = i; j < i + step; j += LANES) {
                    VF p = VF_LOAD(b + j), q = VF_LOAD(b + j + step);
                    VF sum = VF_ADD(p, q), difference = VF_SUB(p, q);
                    if (2 * step == width)
                        sum = VF_MUL(sum, scale), difference = VF_MUL(difference, scale);
                    VF_STORE(b + j, sum);
                    VF_STORE(b + j + step, difference);
                }
        for (int word = 0; IS_BACK && word < width; word += 64) {
            const uint64_t signs = sign_word(seed, (first + block + word) / 64);
            for (int i = 0; i < 64; i += LANES)
                VF_STORE(b + word + i, with_signs(VF_LOAD(b + word + i), signs >> i));
        }
    }
}

void CAT(ktk_rotate_, KTK_ISA)(float *x, int64_t first, int n, int width, uint32_t seed) {
    turn(0, x, first, n, width, seed);
}

void CAT(ktk_rotate_back_, KTK_ISA)(float *x, int64_t first, int n, int width, uint32_t seed) {
    turn(1, x, first, n, width, seed);
}

INLINE VF negative(VF x) { return VF_BITS(VI_XOR(VI_BITS(x), VI_SET32((int)0x80000000u))); }

INLINE VF activate_one(const int KIND, const ktk_activation *act, VF x) {
    const VF one = VF_SET(1.0f);
    if (KIND == KTK_SIGMOID_GLU)
        return VF_DIV(x, VF_ADD(one, exp_clamped(negative(VF_MUL(VF_SET(act->alpha), x)))));
    if (KIND == KTK_GELU_TANH) {
        VF cubic = VF_FMA(VF_MUL(VF_SET(0.044715f), VF_MUL(x, x)), x, x);
        VF u = VF_MUL(VF_SET(1.5957691216057308f), cubic);
        return VF_DIV(x, VF_ADD(one, exp_clamped(negative(u))));
    }
    VF positive = VF_MAX(VF_ZERO(), x);
    return VF_MUL(positive, positive);
}

INLINE void activate(const int KIND, const ktk_activation *a, const float *gates, const float *ups,
                     int step, int num_panels, const float *gate_bias, const float *up_bias,
                     float *h) {
    for (int p = 0; p < num_panels; p++)
        for (int l = p * KTK_PANEL; l < (p + 1) * KTK_PANEL; l += LANES) {
            const int at = p * step + l - p * KTK_PANEL;
            VF up = VF_LOAD(ups + at);
            if (up_bias) up = VF_ADD(up, VF_LOAD(up_bias + l));
            if (!gates) {
                VF_STORE(h + l, activate_one(KIND, a, up));
                continue;
            }
            VF gate = VF_LOAD(gates + at);
            if (gate_bias) gate = VF_ADD(gate, VF_LOAD(gate_bias + l));
            if (KIND == KTK_SIGMOID_GLU)
                gate = VF_MIN(VF_SET(a->gate_max), VF_MAX(VF_SET(a->gate_min), gate));
            VF u = VF_MIN(VF_SET(a->up_max), VF_MAX(VF_SET(a->up_min), up));
            VF_STORE(h + l, VF_MUL(activate_one(KIND, a, gate), VF_ADD(u, VF_SET(a->up_offset))));
        }
}

void CAT(ktk_activate_, KTK_ISA)(const ktk_activation *act, const float *gate, const float *up,
                                 int step, int num_panels, const float *gate_bias,
                                 const float *up_bias, float *h) {
    if (act->kind == KTK_SIGMOID_GLU)
        activate(KTK_SIGMOID_GLU, act, gate, up, step, num_panels, gate_bias, up_bias, h);
    else if (act->kind == KTK_GELU_TANH)
        activate(KTK_GELU_TANH, act, gate, up, step, num_panels, gate_bias, up_bias, h);
    else
        activate(KTK_RELU2, act, gate, up, step, num_panels, gate_bias, up_bias, h);
}

/* The activation of x, and its derivative. */
INLINE VF derive_one(const int KIND, const ktk_activation *act, VF x, VF *slope) {
    const VF one = VF_SET(1.0f);
    if (KIND == KTK_RELU2) {
        const VF positive = VF_MAX(VF_ZERO(), x);
        *slope = VF_ADD(positive, positive);
        return VF_MUL(positive, positive);
    }
    VF u = VF_MUL(VF_SET(act->alpha), x), u_slope = VF_SET(act->alpha);
    if (KIND == KTK_GELU_TANH) {
        const VF factor = VF_SET(1.5957691216057308f), square = VF_MUL(x, x);
        u = VF_MUL(factor, VF_FMA(VF_MUL(VF_SET(0.044715f), square), x, x));
        u_slope = VF_MUL(factor, VF_FMA(VF_SET(3 * 0.044715f), square, one));
    }
    const VF sigmoid = VF_DIV(one, VF_ADD(one, exp_clamped(negative(u))));
    const VF rest = VF_SUB(one, sigmoid);
    *slope = VF_MUL(sigmoid, VF_FMA(VF_MUL(x, rest), u_slope, one));
    return VF_MUL(x, sigmoid);
}

/* d where low <= x <= high, else 0. */
INLINE VF where_within(VF x, float low, float high, VF d) {
    d = VF_WHERE_LT(x, VF_SET(low), VF_ZERO(), d);
    return VF_WHERE_LT(VF_SET(high), x, VF_ZERO(), d);
}

INLINE void activate_back(const int KIND, const ktk_activation *a, const float *gates,
                          const float *ups, const float *d_h, int n, float *h, float *d_gates,
                          float *d_ups) {
    for (int i = 0; i < n; i += LANES) {
        const VF d = VF_LOAD(d_h + i), up = VF_LOAD(ups + i);
        VF slope;
        if (!gates) {
            VF_STORE(h + i, derive_one(KIND, a, up, &slope));
            VF_STORE(d_ups + i, VF_MUL(d, slope));
            continue;
        }
        const VF gate = VF_LOAD(gates + i);
        VF g = gate;
        if (KIND == KTK_SIGMOID_GLU)
            g = VF_MIN(VF_SET(a->gate_max), VF_MAX(VF_SET(a->gate_min), gate));
        VF u = VF_MIN(VF_SET(a->up_max), VF_MAX(VF_SET(a->up_min), up));
        u = VF_ADD(u, VF_SET(a->up_offset));
        const VF act = derive_one(KIND, a, g, &slope);
        VF d_gate = VF_MUL(VF_MUL(d, u), slope);
        if (KIND == KTK_SIGMOID_GLU) d_gate = where_within(gate, a->gate_min, a->gate_max, d_gate);
        VF_STORE(h + i, VF_MUL(act, u));
        VF_STORE(d_gates + i, d_gate);
        VF_STORE(d_ups + i, where_within(up, a->up_min, a->up_max, VF_MUL(d, act)));
    }
}

void CAT(ktk_activate_back_, KTK_ISA)(const ktk_activation *act, const float *gate, const float *up,
                                      const float *d_h, int n, float *h, float *d_gate,
                                      float *d_up) {
    if (act->kind == KTK_SIGMOID_GLU)
        activate_back(KTK_SIGMOID_GLU, act, gate, up, d_h, n, h, d_gate, d_up);
    else if (act->kind == KTK_GELU_TANH)
        activate_back(KTK_GELU_TANH, act, gate, up, d_h, n, h, d_gate, d_up);
    else
        activate_back(KTK_RELU2, act, gate, up, d_h, n, h, d_gate, d_up);
}

/* MurmurHash3's finaliser (Appleby): every bit of x in every bit. */
INLINE VI mixed(VI x) {
    x = VI_MUL32(VI_XOR(x, VI_SRL32(x, 16)), VI_SET32((int)0x85ebca6bu));
    x = VI_MUL32(VI_XOR(x, VI_SRL32(x, 13)), VI_SET32((int)0xc2b2ae35u));
    return VI_XOR(x, VI_SRL32(x, 16));
}

void CAT(ktk_drop_, KTK_ISA)(const ktk_dropout *d, uint32_t row, int first, int n, float *x) {
    const uint32_t golden = 0x9e3779b9u;
    const VI base = mixed(VI_SET32((int)(d->seed + golden * row)));
    const VI top = VI_SET32(INT32_MIN); /* unsigned compared as signed */
    const VI threshold = VI_XOR(VI_SET32((int)d->threshold), top);
    for (int i = 0; i < n; i += LANES) {
        uint32_t column[LANES];
        for (int l = 0; l < LANES; l++) column[l] = golden * (uint32_t)(first + i + l);
        const VI bits = mixed(VI_ADD32(base, VI_LOAD(column)));
        const VF kept = VF_MUL(VF_LOAD(x + i), VF_SET(d->scale));
        VF_STORE(x + i,
                 VF_BITS(VI_WHERE_LESS(VI_XOR(bits, top), threshold, VI_ZERO(), VI_BITS(kept))));
    }
}

INLINE uint16_t to_bf16(float x) {
    uint32_t b = bits_of(x);
    uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return (uint16_t)((b & 0x7fffffffu) > INF_BITS ? (b >> 16) | 0x40u : rounded);
}

void CAT(ktk_load_, KTK_ISA)(int dtype, const void *src, int64_t n, float *dst) {
    int64_t i = 0;
    if (dtype == KTK_DTYPE_F32) {
        memcpy(dst, src, 4 * (size_t)n);
    } else if (dtype == KTK_DTYPE_BF16) {
        const uint16_t *s = src;
        for (; i < n; i++) dst[i] = float_of((uint32_t)s[i] << 16);
    } else {
        const uint16_t *s = src;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(s + i))));
        for (; i < n; i++) dst[i] = _cvtsh_ss(s[i]);
    }
}

void CAT(ktk_store_, KTK_ISA)(int dtype, const float *src, int64_t n, void *dst) {
    int64_t i = 0;
    if (dtype == KTK_DTYPE_F32) {
        memcpy(dst, src, 4 * (size_t)n);
    } else if (dtype == KTK_DTYPE_BF16) {
        uint16_t *d = dst;
        for (; i < n; i++) d[i] = to_bf16(src[i]);
    } else {
        uint16_t *d = dst;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(d + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
        for (; i < n; i++) d[i] = _cvtss_sh(src[i], 0);
    }
}

void CAT(ktk_combine_, KTK_ISA)(const float *y, int64_t stride, const int32_t *place,
                                const float *weights, int top_k, int n, float *acc) {
    for (int i = 0; i < n; i += LANES) {
        VF sum = VF_ZERO();
        for (int j = 0; j < top_k; j++)
            if (place[j] >= 0)
                sum = VF_FMA(VF_LOAD(y + place[j] * stride + i), VF_SET(weights[j]), sum);
        VF_STORE(acc + i, sum);
    }
}

void CAT(ktk_add_, KTK_ISA)(float *acc, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) acc[i] += y[i];
}
