/* Loops that do nothing but one kind of instruction, or nothing but loads: the ceilings of an ISA
 * row. Compiled once per row; each row holds what it adds to the rows below.
 *
 * Registers: 16 accumulators of 32 (zmm), 12 of 16 (ymm), 6 of 8 tiles; latencies are 4-5 cycles at
 * two instructions a cycle (TDPBSUD: 52 at one in 16), so 10 (4) would do. Each loop holds the
 * instructions that a kernel cannot do without, and neither loads nor broadcasts. Intel SDM vol. 2;
 * uops.info for latencies. */
#include <immintrin.h>

#include "ktk_roof.h"

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define UNROLL _Pragma("GCC unroll 16")
#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

/* To the compiler operand and sum are new from here on: products are not moved out of the loop,
 * sums not put off (they would spill). No instruction. */
#define RENEW(operand, sum) __asm__("" : "+v"(operand), "+v"(sum))
#define KEEP(v) __asm__ volatile("" : : "v"(v))

/* NUM accumulators a[j], one `ACCUMULATE` each a step, of the same two operands x and y. */
#define PEAK(FUNCTION, VECTOR, NUM, ZERO, X, Y, ACCUMULATE)                                        \
    static void FUNCTION(int64_t steps) {                                                          \
        VECTOR a[NUM];                                                                             \
        __typeof__(X) x = X, y = Y;                                                                \
        UNROLL for (int j = 0; j < NUM; j++) a[j] = ZERO;                                          \
        for (int64_t i = 0; i < steps; i++) UNROLL                                                 \
        for (int j = 0; j < NUM; j++) {                                                            \
            ACCUMULATE;                                                                            \
            RENEW(x, a[j]);                                                                        \
        }                                                                                          \
        KEEP(y);                                                                                   \
        UNROLL for (int j = 0; j < NUM; j++) KEEP(a[j]);                                           \
    }

/* 4-bit codes without VNNI: sums of eight VPMADDUBSW fit int16 (15*127*2*8 = 30480), then VPMADDWD
 * by ones. */
#define PEAK_NIBBLES(FUNCTION, VECTOR, NUM, SET8, SET16, ZERO, MADDUBS, ADD16, MADD, ADD32)        \
    static void FUNCTION(int64_t steps) {                                                          \
        VECTOR a[NUM], total = ZERO(), x = SET8(3), y = SET8(2), ones = SET16(1);                  \
        for (int64_t i = 0; i < steps; i++) {                                                      \
            UNROLL for (int j = 0; j < NUM; j++) {                                                 \
                a[j] = MADDUBS(x, y);                                                              \
                RENEW(x, a[j]);                                                                    \
            }                                                                                      \
            UNROLL for (int r = 1; r < 8; r++) UNROLL for (int j = 0; j < NUM; j++) {              \
                a[j] = ADD16(a[j], MADDUBS(x, y));                                                 \
                RENEW(x, a[j]);                                                                    \
            }                                                                                      \
            UNROLL for (int j = 0; j < NUM; j++) total = ADD32(total, MADD(a[j], ones));           \
        }                                                                                          \
        KEEP(total);                                                                               \
    }

/* Reads `streams` runs side by side, two cache lines of each in turn. */
#define READ(FUNCTION, STREAMS, AHEAD, VECTOR, ZERO, LOAD, OR)                                     \
    static void FUNCTION(const uint8_t *first, int64_t stride, int64_t bytes) {                    \
        enum { WIDTH = sizeof(VECTOR), PER_TURN = 128 / WIDTH };                                   \
        VECTOR seen[PER_TURN];                                                                     \
        UNROLL for (int v = 0; v < PER_TURN; v++) seen[v] = ZERO();                                \
        for (int64_t at = 0; at < bytes; at += 128) UNROLL                                         \
        for (int s = 0; s < STREAMS; s++) {                                                        \
            const uint8_t *p = first + s * stride + at;                                            \
            if (AHEAD) {                                                                           \
                _mm_prefetch((const char *)p + AHEAD, _MM_HINT_T0);                                \
                _mm_prefetch((const char *)p + AHEAD + 64, _MM_HINT_T0);                           \
            }                                                                                      \
            UNROLL for (int v = 0; v < PER_TURN; v++) seen[v] =                                    \
                OR(seen[v], LOAD((const void *)(p + WIDTH * v)));                                  \
        }                                                                                          \
        UNROLL for (int v = 0; v < PER_TURN; v++) KEEP(seen[v]);                                   \
    }
#define READS(...)                                                                                 \
    READ(read1, 1, 0, __VA_ARGS__)                                                                 \
    READ(read2, 2, 0, __VA_ARGS__)                                                                 \
    READ(read4, 4, 0, __VA_ARGS__)                                                                 \
    READ(read8, 8, 0, __VA_ARGS__)                                                                 \
    READ(read1_ahead, 1, 2048, __VA_ARGS__)                                                        \
    READ(read2_ahead, 2, 2048, __VA_ARGS__)                                                        \
    READ(read4_ahead, 4, 2048, __VA_ARGS__)                                                        \
    READ(read8_ahead, 8, 2048, __VA_ARGS__)                                                        \
    static const ktk_roof_pattern patterns[] = {                                                   \
        {"1 stream", 1, read1},                                                                    \
        {"2 streams", 2, read2},                                                                   \
        {"4 streams", 4, read4},                                                                   \
        {"8 streams", 8, read8},                                                                   \
        {"1 stream, prefetched", 1, read1_ahead},                                                  \
        {"2 streams, prefetched", 2, read2_ahead},                                                 \
        {"4 streams, prefetched", 4, read4_ahead},                                                 \
        {"8 streams, prefetched", 8, read8_ahead},                                                 \
    };

#if defined(__AMX_INT8__)

/* Six sums of the same two operands; all tiles of 16 rows of 64 bytes. Loading a configuration
 * zeroes the tiles. */
#define PEAK_TILES(FUNCTION, DP)                                                                   \
    static void FUNCTION(int64_t steps) {                                                          \
        _tile_loadconfig(&full_tiles);                                                             \
        for (int64_t i = 0; i < steps; i++) {                                                      \
            DP(0, 6, 7);                                                                           \
            DP(1, 6, 7);                                                                           \
            DP(2, 6, 7);                                                                           \
            DP(3, 6, 7);                                                                           \
            DP(4, 6, 7);                                                                           \
            DP(5, 6, 7);                                                                           \
        }                                                                                          \
        _tile_release();                                                                           \
    }
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} full_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

PEAK_TILES(tdpbsud, _tile_dpbsud)
__attribute__((target("amx-bf16")))
PEAK_TILES(tdpbf16ps, _tile_dpbf16ps) static const ktk_roof_peak peaks[] = {
    {"amx int8", "", 6 * 16 * 16 * 64, tdpbsud},
    {"amx bf16", "amx_bf16", 6 * 16 * 16 * 32, tdpbf16ps},
};

#elif defined(__AVX512VNNI__)

PEAK(dpbusd_zmm, __m512i, 16, _mm512_setzero_si512(), _mm512_set1_epi8(3), _mm512_set1_epi8(2),
     a[j] = _mm512_dpbusd_epi32(a[j], x, y))
PEAK(dpbusd_ymm, __m256i, 16, _mm256_setzero_si256(), _mm256_set1_epi8(3), _mm256_set1_epi8(2),
     a[j] = _mm256_dpbusd_epi32(a[j], x, y))
static const ktk_roof_peak peaks[] = {
    {"avx512vnni int8", "", 16 * 64, dpbusd_zmm},
    {"avx512vnni int8 ymm", "", 16 * 32, dpbusd_ymm},
};

#elif defined(__AVX512F__)

PEAK(madd, __m512i, 16, _mm512_setzero_si512(), _mm512_set1_epi16(3), _mm512_set1_epi16(2),
     a[j] = _mm512_add_epi32(a[j], _mm512_madd_epi16(x, y)))
PEAK_NIBBLES(maddubs, __m512i, 16, _mm512_set1_epi8, _mm512_set1_epi16, _mm512_setzero_si512,
             _mm512_maddubs_epi16, _mm512_add_epi16, _mm512_madd_epi16, _mm512_add_epi32)
PEAK(fmadd, __m512, 16, _mm512_setzero_ps(), _mm512_set1_ps(1), _mm512_set1_ps(0.5f),
     a[j] = _mm512_fmadd_ps(x, y, a[j]))
__attribute__((target("avx512bf16")))
PEAK(dpbf16, __m512, 16, _mm512_setzero_ps(), (__m512bh)_mm512_set1_epi16(0x3f80),
     (__m512bh)_mm512_set1_epi16(0x3f00), a[j] = _mm512_dpbf16_ps(a[j], x, y))
    READS(__m512i, _mm512_setzero_si512, _mm512_load_si512,
          _mm512_or_si512) static const ktk_roof_peak peaks[] = {
        {"avx512 int8", "", 16 * 32, madd},
        {"avx512 int4", "", 16 * 8 * 64, maddubs},
        {"avx512 fp32", "", 16 * 16, fmadd},
        {"avx512 bf16", "avx512_bf16", 16 * 32, dpbf16},
};
#define HAS_PATTERNS

#else

PEAK(madd, __m256i, 12, _mm256_setzero_si256(), _mm256_set1_epi16(3), _mm256_set1_epi16(2),
     a[j] = _mm256_add_epi32(a[j], _mm256_madd_epi16(x, y)))
PEAK_NIBBLES(maddubs, __m256i, 10, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_setzero_si256,
             _mm256_maddubs_epi16, _mm256_add_epi16, _mm256_madd_epi16, _mm256_add_epi32)
PEAK(fmadd, __m256, 12, _mm256_setzero_ps(), _mm256_set1_ps(1), _mm256_set1_ps(0.5f),
     a[j] = _mm256_fmadd_ps(x, y, a[j]))
__attribute__((target("avxvnni"))) PEAK(dpbusd, __m256i, 12, _mm256_setzero_si256(),
                                        _mm256_set1_epi8(3), _mm256_set1_epi8(2),
                                        a[j] = _mm256_dpbusd_avx_epi32(a[j], x, y))
    READS(__m256i, _mm256_setzero_si256, _mm256_load_si256,
          _mm256_or_si256) static const ktk_roof_peak peaks[] = {
        {"avx2 int8", "", 12 * 16, madd},
        {"avx2 int4", "", 10 * 8 * 32, maddubs},
        {"avx2 fp32", "", 12 * 8, fmadd},
        {"avxvnni int8", "avx_vnni", 12 * 32, dpbusd},
};
#define HAS_PATTERNS

#endif

const ktk_roof CAT(ktk_roof_, KTK_ISA) = {
    TEXT(KTK_ISA),   COUNT(peaks),
#ifdef HAS_PATTERNS
    COUNT(patterns), peaks,        patterns,
#else
    0,
    peaks,
    0,
#endif
};
