/* One spelling for both vector widths: VI and VF are zmm with AVX-512, ymm without; PV of them make
 * a panel row. */
#ifndef KTK_VEC_H
#define KTK_VEC_H

#include <immintrin.h>
#include <stdint.h>

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define INLINE static inline __attribute__((always_inline))
/* Sums in the order written: GCC makes trees of integer additions and has no registers for them. */
#define VI_PIN(x) __asm__("" : "+v"(x))
#define UNROLL _Pragma("GCC unroll 16")

#ifdef __AVX512F__
enum { PV = 1, LANES = 16 }; /* vectors per panel row, fp32 lanes */
typedef __m512i VI;
typedef __m512 VF;
#define VI_LOAD(p) _mm512_loadu_si512((const void *)(p))
#define VI_AND _mm512_and_si512
#define VI_ANDNOT _mm512_andnot_si512 /* ~a & b */
#define VI_OR _mm512_or_si512
#define VI_UNPACK_LOW8 _mm512_unpacklo_epi8
#define VI_UNPACK_HIGH8 _mm512_unpackhi_epi8
#define VI_UNPACK_LOW32 _mm512_unpacklo_epi32
#define VI_UNPACK_HIGH32 _mm512_unpackhi_epi32
#define VI_UNPACK_LOW64 _mm512_unpacklo_epi64
#define VI_UNPACK_HIGH64 _mm512_unpackhi_epi64
#define VI_SHUFFLE8 _mm512_shuffle_epi8
#define VI_LOAD_TABLE(p)                                                                           \
    _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(p))) /* 16 bytes in every lane */
#define VI_STORE(p, v) _mm512_storeu_si512((void *)(p), v)
#define VI_SLL16 _mm512_slli_epi16
#define VI_SRA32 _mm512_srai_epi32
#define VI_SRA16 _mm512_srai_epi16
#define VI_U8(x) _mm512_cvtepu8_epi32(x)
#define VI_U16(x) _mm512_cvtepu16_epi32(x)
/* fp16 to fp32: LANES halves; the low halves of dwords. */
#define VF_HALF(x) _mm512_cvtph_ps(x)
#define VF_LOAD_HALF(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define VI_LOAD_U8(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define VF_LOW_HALF(x) _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x))
#define VI_SET8(x) _mm512_set1_epi8(x)
#define VI_SET16(x) _mm512_set1_epi16(x)
#define VI_SET32(x) _mm512_set1_epi32(x)
#define VI_SRL16 _mm512_srli_epi16
#define VI_SLL32 _mm512_slli_epi32
#define VI_SLLV32 _mm512_sllv_epi32
#define VI_ADD32 _mm512_add_epi32
#define VI_ADD16 _mm512_add_epi16
#define VI_ADD8 _mm512_add_epi8
#define VI_SUB8 _mm512_sub_epi8
#define VI_SUBS_U8 _mm512_subs_epu8
#define VI_MIN_U8 _mm512_min_epu8
/* yes where x has a byte's bit of mask, which is one bit in every byte. */
#define VI_WHERE_BIT(x, mask, yes, no) _mm512_mask_mov_epi8(no, _mm512_test_epi8_mask(x, mask), yes)
#define VI_MADD _mm512_madd_epi16
#define VI_MADDUBS _mm512_maddubs_epi16
/* acc += u8 w * s8 broadcast of the four bytes at p. In assembly: GCC 12 would load the broadcast
 * by itself. */
#define VI_DOT_BROADCAST(acc, w, p)                                                                \
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const uint8_t (*)[4])(p)))
#define VI_ZERO _mm512_setzero_si512
#define VF_CVT _mm512_cvtepi32_ps
#define VF_LOAD(p) _mm512_loadu_ps((const float *)(p))
#define VF_STORE(p, v) _mm512_storeu_ps(p, v)
#define VF_SET _mm512_set1_ps
#define VF_ZERO _mm512_setzero_ps
#define VF_FMA _mm512_fmadd_ps
#define VF_BITS _mm512_castsi512_ps
#define VI_BITS _mm512_castps_si512
#define VF_ADD _mm512_add_ps
#define VF_SUB _mm512_sub_ps
#define VF_MUL _mm512_mul_ps
#define VF_DIV _mm512_div_ps
#define VF_MIN _mm512_min_ps
#define VF_MAX _mm512_max_ps
#define VF_WHERE_LT(a, b, yes, no) _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes)
#define VF_WHERE_0(a, yes, no)                                                                     \
    _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, VF_ZERO(), _CMP_EQ_OQ), yes)
#define VI_SRL32 _mm512_srli_epi32
#define VI_BF16(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define VI_I8(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define VI_XOR _mm512_xor_si512
#define VI_SUB32 _mm512_sub_epi32
#define VI_MAX_U32 _mm512_max_epu32
#define VI_MUL32 _mm512_mullo_epi32
#define VI_WHERE_LESS(a, b, yes, no) /* of signed dwords */                                        \
    _mm512_mask_mov_epi32(no, _mm512_cmplt_epi32_mask(a, b), yes)
#define VI_ROUND(x) _mm512_cvtps_epi32(x)
#define VI_REDUCE_ADD32 _mm512_reduce_add_epi32
#define VI_REDUCE_MAX_U32 _mm512_reduce_max_epu32
#else
enum { PV = 2, LANES = 8 };
typedef __m256i VI;
typedef __m256 VF;
#define VI_LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define VI_AND _mm256_and_si256
#define VI_ANDNOT _mm256_andnot_si256 /* ~a & b */
#define VI_OR _mm256_or_si256
#define VI_UNPACK_LOW8 _mm256_unpacklo_epi8
#define VI_UNPACK_HIGH8 _mm256_unpackhi_epi8
#define VI_UNPACK_LOW32 _mm256_unpacklo_epi32
#define VI_UNPACK_HIGH32 _mm256_unpackhi_epi32
#define VI_UNPACK_LOW64 _mm256_unpacklo_epi64
#define VI_UNPACK_HIGH64 _mm256_unpackhi_epi64
#define VI_SHUFFLE8 _mm256_shuffle_epi8
#define VI_LOAD_TABLE(p) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p)))
#define VI_STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define VI_SLL16 _mm256_slli_epi16
#define VI_SRA32 _mm256_srai_epi32
#define VI_SRA16 _mm256_srai_epi16
#define VI_U8(x) _mm256_cvtepu8_epi32(x)
#define VI_U16(x) _mm256_cvtepu16_epi32(x)
#define VF_HALF(x) _mm256_cvtph_ps(x)
#define VF_LOAD_HALF(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define VI_LOAD_U8(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
INLINE __m256 VF_LOW_HALF(__m256i x) {
    x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(
        _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
#define VI_SET8(x) _mm256_set1_epi8(x)
#define VI_SET16(x) _mm256_set1_epi16(x)
#define VI_SET32(x) _mm256_set1_epi32(x)
#define VI_SRL16 _mm256_srli_epi16
#define VI_SLL32 _mm256_slli_epi32
#define VI_SLLV32 _mm256_sllv_epi32
#define VI_ADD32 _mm256_add_epi32
#define VI_ADD16 _mm256_add_epi16
#define VI_ADD8 _mm256_add_epi8
#define VI_SUB8 _mm256_sub_epi8
#define VI_SUBS_U8 _mm256_subs_epu8
#define VI_MIN_U8 _mm256_min_epu8
INLINE __m256i VI_WHERE_BIT(__m256i x, __m256i mask, __m256i yes, __m256i no) {
    return _mm256_blendv_epi8(no, yes, _mm256_cmpeq_epi8(_mm256_and_si256(x, mask), mask));
}
#define VI_MADD _mm256_madd_epi16
#define VI_MADDUBS _mm256_maddubs_epi16
#define VI_ZERO _mm256_setzero_si256
#define VF_CVT _mm256_cvtepi32_ps
#define VF_LOAD(p) _mm256_loadu_ps((const float *)(p))
#define VF_STORE(p, v) _mm256_storeu_ps(p, v)
#define VF_SET _mm256_set1_ps
#define VF_ZERO _mm256_setzero_ps
#define VF_FMA _mm256_fmadd_ps
#define VF_BITS _mm256_castsi256_ps
#define VI_BITS _mm256_castps_si256
#define VF_ADD _mm256_add_ps
#define VF_SUB _mm256_sub_ps
#define VF_MUL _mm256_mul_ps
#define VF_DIV _mm256_div_ps
#define VF_MIN _mm256_min_ps
#define VF_MAX _mm256_max_ps
#define VF_WHERE_LT(a, b, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ))
#define VF_WHERE_0(a, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, VF_ZERO(), _CMP_EQ_OQ))
#define VI_SRL32 _mm256_srli_epi32
#define VI_BF16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define VI_I8(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define VI_XOR _mm256_xor_si256
#define VI_SUB32 _mm256_sub_epi32
#define VI_MAX_U32 _mm256_max_epu32
#define VI_MUL32 _mm256_mullo_epi32
#define VI_WHERE_LESS(a, b, yes, no) _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a))
#define VI_ROUND(x) _mm256_cvtps_epi32(x)
INLINE int32_t VI_REDUCE_ADD32(VI x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
INLINE uint32_t VI_REDUCE_MAX_U32(VI x) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1)));
}
#endif

#endif
