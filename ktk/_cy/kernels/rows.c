/* Elementwise kernels of one ISA row: activation quantisation, the activation function, dtype conversion,
 * sums. Plain C in loops of 16 lanes that the compiler turns into this row's vectors; every operation is IEEE
 * and stands in the order ktk/reference states, so all rows agree bit for bit.
 *
 * Comparisons are written so that a NaN operand is kept: `low > x ? low : x` is maxps(low, x). */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "ktk.h"

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define INLINE static inline __attribute__((always_inline))
enum { L = 16 };

INLINE uint32_t bits_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}
INLINE float float_of(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}
INLINE float at_least(float low, float x) { return low > x ? low : x; }
INLINE float at_most(float high, float x) { return high < x ? high : x; }

static const float MAGIC =
    12582912.0f; /* 1.5 * 2^23: adding and subtracting rounds half to even below 2^22 */
static const float TINY_AMAX = 1.5e-36f; /* below it 127 / amax overflows: the group counts as zero */
static const uint32_t INF_BITS = 0x7f800000u;

void CAT(ktk_quantise_, KTK_ISA)(const float *x, int n, int group, int fine, int zero_point, int codes_kind,
                                 uint8_t *codes, float *scales, int32_t *correction) {
    for (int g = 0, f_index = 0; g * group < n; g++) {
        const int begin = g * group, end = begin + group < n ? begin + group : n;
        uint32_t lane_max[L] = {0}, magnitude = 0;
        for (int i = begin; i < end; i += L)
            for (int l = 0; l < L; l++) {
                uint32_t b = bits_of(x[i + l]) & 0x7fffffffu;
                lane_max[l] = b > lane_max[l] ? b : lane_max[l];
            }
        for (int l = 0; l < L; l++) magnitude = lane_max[l] > magnitude ? lane_max[l] : magnitude;
        float amax = float_of(magnitude), inverse = 0.0f, scale = 0.0f;
        if (magnitude >= INF_BITS) {
            scale = float_of(0x7fc00000u);
        } else if (amax >= TINY_AMAX) {
            inverse = 127.0f / amax;
            scale = amax / 127.0f;
        }
        scales[g] = scale;
        for (int f = begin; f < end; f += fine, f_index++) {
            const int f_end = f + fine < end ? f + fine : end;
            int32_t lane_sum[L] = {0}, sum = 0;
            for (int i = f; i < f_end; i += L) {
                int32_t q[L];
                for (int l = 0; l < L; l++) { /* a NaN must not reach the integer conversion */
                    float v = inverse == 0.0f ? 0.0f : x[i + l];
                    q[l] = (int32_t)((v * inverse + MAGIC) - MAGIC);
                    lane_sum[l] += q[l];
                }
                if (codes_kind == KTK_CODES_I8) {
                    for (int l = 0; l < L; l++) codes[i + l] = (uint8_t)q[l];
                } else {
                    int16_t *wide = (int16_t *)codes + i;
                    for (int l = 0; l < L; l += 4) {
                        wide[l] = (int16_t)q[l];
                        wide[l + 1] = (int16_t)q[l + 2];
                        wide[l + 2] = (int16_t)q[l + 1];
                        wide[l + 3] = (int16_t)q[l + 3];
                    }
                }
            }
            for (int l = 0; l < L; l++) sum += lane_sum[l];
            correction[f_index] = -zero_point * sum;
        }
    }
}

/* exp on [-87, 88], Cephes' polynomial; see ktk/reference/activation.py. */
INLINE float exp_clamped(float x) {
    x = at_most(88.0f, at_least(-87.0f, x));
    float n = (x * 1.44269504088896341f + MAGIC) - MAGIC;
    float r = __builtin_fmaf(n, -0.693359375f, x);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    /* n + MAGIC holds the integer n in its low bits, NaN holds nonsense that p, a NaN too, swallows. */
    uint32_t power = (bits_of(n + MAGIC) - bits_of(MAGIC) + 127u) << 23;
    return p * float_of(power);
}

INLINE float activate_one(const ktk_activation *act, float x) {
    if (act->kind == KTK_SIGMOID_GLU) return x / (1.0f + exp_clamped(-(act->alpha * x)));
    if (act->kind == KTK_GELU_TANH) {
        float u = 1.5957691216057308f * __builtin_fmaf(0.044715f * (x * x), x, x);
        return x / (1.0f + exp_clamped(-u));
    }
    float positive = at_least(0.0f, x);
    return positive * positive;
}

void CAT(ktk_activate_, KTK_ISA)(const ktk_activation *act, float *v, int num_panels, const float *gate_bias,
                                 const float *up_bias, float *h) {
    const ktk_activation a = *act;
    for (int p = 0; p < num_panels; p++, v += (a.has_gate ? 2 : 1) * L, h += L) {
        float *up = a.has_gate ? v + L : v;
        if (up_bias)
            for (int l = 0; l < L; l++) up[l] += up_bias[p * L + l];
        if (!a.has_gate) {
            for (int l = 0; l < L; l++) h[l] = activate_one(&a, up[l]);
            continue;
        }
        if (gate_bias)
            for (int l = 0; l < L; l++) v[l] += gate_bias[p * L + l];
        if (a.kind == KTK_SIGMOID_GLU)
            for (int l = 0; l < L; l++) v[l] = at_most(a.gate_max, at_least(a.gate_min, v[l]));
        for (int l = 0; l < L; l++) {
            float u = at_most(a.up_max, at_least(a.up_min, up[l])) + a.up_offset;
            h[l] = activate_one(&a, v[l]) * u;
        }
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

void CAT(ktk_add_scaled_, KTK_ISA)(float *acc, const float *y, float weight, int64_t n) {
    for (int64_t i = 0; i < n; i++) acc[i] = __builtin_fmaf(y[i], weight, acc[i]);
}

void CAT(ktk_add_, KTK_ISA)(float *acc, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) acc[i] += y[i];
}
