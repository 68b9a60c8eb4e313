/* What every part of the kernels knows: the width of a strip, and what a format's row says, folded
 * at compile time. */
#ifndef LF_TRAITS_H
#define LF_TRAITS_H

#include "ktk_kernels.h"
#include "vec.h"

enum { STRIPS = KTK_PANEL / LANES, VI_BYTES = sizeof(VI) };
enum { CALL_ROWS = 128 }; /* most of a call */

/* What a format's row says, folded at compile time. Float formats: 32 weights are a block. */
typedef struct {
    int weights, bytes, run, dwords, head, head_bytes, fine, zero, has_min, most, row_head,
        float_bytes;
} traits;
static const traits TRAITS[KTK_NUM_FORMATS] = {
#define ROW(NAME, TEXT, TYPE, WEIGHTS, BYTES, RUN, DWORDS, HEAD, HEAD_BYTES, FINE, ZERO, HAS_MIN,  \
            MOST, ROW_HEAD)                                                                        \
    [KTK_BLOCK_##NAME] = {WEIGHTS, BYTES, RUN,     DWORDS, HEAD,     HEAD_BYTES,                   \
                          FINE,    ZERO,  HAS_MIN, MOST,   ROW_HEAD, 0},
#define FLOAT_ROW(NAME, TEXT, TYPE, BYTES, PER_DWORD)                                              \
    [KTK_BLOCK_##NAME] = {32, 32 * BYTES, 0, 8 * BYTES, 0, 0, 0, 0, 0, 0, 0, BYTES},
    LF_FLOAT_FORMATS(FLOAT_ROW) LF_INTEGER_FORMATS(ROW)
#undef ROW
#undef FLOAT_ROW
};
enum { MAX_DWORDS = 64, RAW_BYTES = MAX_DWORDS * 64 + 64 };
INLINE int raw_bytes(const int FORMAT) {
    return 64 * TRAITS[FORMAT].dwords + 16 * TRAITS[FORMAT].head_bytes;
}

/* How bytes are multiplied: as they are where that is exact, else widened to 16 bits. */
#ifdef __AVX512VNNI__
#define IS_WIDE(MOST) 0
#else
#define IS_WIDE(MOST) ((MOST) > 127)
#endif

#endif
