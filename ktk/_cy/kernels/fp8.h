/* fp8 e4m3 to fp32, exactly.
 *
 * A code's low seven bits are the exponent and mantissa of a half whose exponent is 8 smaller:
 * shifted by seven they become fp16, denormals too, and VCVTPH2PS then 256 is exact. Sixteen
 * weights: one load, four integer operations, two (AVX2) or one (AVX-512) conversions and
 * products. */
#ifndef KTK_FP8_H
#define KTK_FP8_H

#include "ktk_kernels.h"
#include "vec.h"

INLINE void fp8_weights(const uint8_t *codes, VF w[PV]) {
    const __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
    const __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(c, 7), _mm256_set1_epi16(0x3f80));
    const __m256i sign =
        _mm256_and_si256(_mm256_slli_epi16(c, 8), _mm256_set1_epi16((short)0x8000));
    const __m256i half = _mm256_or_si256(magnitude, sign);
#ifdef __AVX512F__
    w[0] = VF_MUL(VF_HALF(half), VF_SET(256.0f));
#else
    w[0] = VF_MUL(VF_HALF(_mm256_castsi256_si128(half)), VF_SET(256.0f));
    w[1] = VF_MUL(VF_HALF(_mm256_extracti128_si256(half, 1)), VF_SET(256.0f));
#endif
}

#endif
