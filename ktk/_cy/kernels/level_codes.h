/* Codes of nl2, nl3 and nl4 (ktk/experts/layout.py), 32 k of 16 channels a unit of 64 bytes for
 * each bit: indices into ktk_levels, as byte shuffles take them. */
#ifndef KTK_LEVEL_CODES_H
#define KTK_LEVEL_CODES_H

#include "ktk_kernels.h"
#include "vec.h"

enum { LEVEL_UNIT_BYTES = 64 }; /* times the bits: 32 k of a panel */

/* Where the codes of k lie, a multiple of 32. */
INLINE int64_t level_codes_at(const ktk_matrix *w, int bits, int k) {
    return w->code_offset + (int64_t)(k / 32) * LEVEL_UNIT_BYTES * bits;
}

/* NAME(bits, unit, pair, at, first, second): k [8 * pair, 8 * pair + 4) of a unit and the four
 * behind, of the channels whose bytes begin `at` in a row. The index is the low nibble of a byte
 * whose top bit is 0, modulo the number of levels. Of 3 bits the last eight k lie in the top bits
 * of the others' nibbles. */
#define LEVEL_PAIR(NAME, V, LOAD, AND, OR, SRL16, SET8)                                            \
    INLINE void NAME(const int BITS, const uint8_t *unit, const int pair, const int at, V *first,  \
                     V *second) {                                                                  \
        const V mask = SET8(15), spare = SET8((char)0x88);                                         \
        if (BITS == 3 && pair == 3) {                                                              \
            const V a = SRL16(AND(LOAD(unit + at), spare), 3);                                     \
            const V b = SRL16(AND(LOAD(unit + 64 + at), spare), 2);                                \
            const V c = SRL16(AND(LOAD(unit + 128 + at), spare), 1);                               \
            *first = OR(OR(a, b), c);                                                              \
            *second = SRL16(*first, 4);                                                            \
            return;                                                                                \
        }                                                                                          \
        V codes = LOAD(unit + LEVEL_UNIT_BYTES * (BITS == 2 ? pair / 2 : pair) + at);              \
        if (BITS == 2 && pair % 2) codes = SRL16(codes, 4);                                        \
        *first = AND(codes, mask);                                                                 \
        *second = AND(SRL16(codes, BITS == 2 ? 2 : 4), mask);                                      \
    }

LEVEL_PAIR(level_pair, VI, VI_LOAD, VI_AND, VI_OR, VI_SRL16, VI_SET8)

#endif
