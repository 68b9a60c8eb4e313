/* The numbers of nl2, nl3 and nl4, as ktk/experts/formats/panels.py has them. */
#ifndef KTK_LEVELS_H
#define KTK_LEVELS_H

#include <stdint.h>

/* Added to a level, so that codes are unsigned; levels are within it, a multiplier times a level
 * within 127. */
enum { KTK_LEVEL_ZERO = 16 };

/* Fewer than 16 levels are repeated: what stands above a code's bits in its nibble counts nothing.
 */
typedef struct {
    uint8_t levels[16]; /* plus KTK_LEVEL_ZERO */
    int8_t multipliers[16];
} ktk_level_numbers;

#define KTK_LEVEL(LEVEL) KTK_LEVEL_ZERO + (LEVEL)
#define KTK_LEVELS_4(A, B, C, D) KTK_LEVEL(A), KTK_LEVEL(B), KTK_LEVEL(C), KTK_LEVEL(D)
#define KTK_MULTIPLIERS(A, B, C, D, E, F, G, H)                                                    \
    {A, B, C, D, E, F, G, H, -(A), -(B), -(C), -(D), -(E), -(F), -(G), -(H)}

/* Of so many bits a code. */
static const ktk_level_numbers ktk_levels[5] __attribute__((aligned(16))) = {
    [2] = {{KTK_LEVELS_4(-10, -4, 0, 6), KTK_LEVELS_4(-10, -4, 0, 6), KTK_LEVELS_4(-10, -4, 0, 6),
            KTK_LEVELS_4(-10, -4, 0, 6)},
           KTK_MULTIPLIERS(5, 6, 7, 8, 9, 10, 11, 12)},
    [3] = {{KTK_LEVELS_4(-8, -5, -3, -1), KTK_LEVELS_4(0, 2, 4, 7), KTK_LEVELS_4(-8, -5, -3, -1),
            KTK_LEVELS_4(0, 2, 4, 7)},
           KTK_MULTIPLIERS(6, 7, 8, 9, 10, 11, 12, 14)},
    [4] = {{KTK_LEVELS_4(-10, -8, -6, -5), KTK_LEVELS_4(-4, -3, -2, -1), KTK_LEVELS_4(0, 1, 2, 3),
            KTK_LEVELS_4(4, 5, 7, 9)},
           KTK_MULTIPLIERS(5, 6, 7, 8, 9, 10, 11, 12)},
};

#endif
