/* The numbers of nl4, as ktk/experts/formats/panels.py has them. */
#ifndef KTK_LEVELS_H
#define KTK_LEVELS_H

#include <stdint.h>

/* Added to a level, so that codes are unsigned; levels are within it, a multiplier times a level
 * within 127. */
enum { KTK_LEVEL_ZERO = 16 };
#define KTK_LEVEL(LEVEL) KTK_LEVEL_ZERO + (LEVEL)
static const uint8_t ktk_levels[16] __attribute__((aligned(16))) = {
    KTK_LEVEL(-10), KTK_LEVEL(-8), KTK_LEVEL(-6), KTK_LEVEL(-5), KTK_LEVEL(-4), KTK_LEVEL(-3),
    KTK_LEVEL(-2),  KTK_LEVEL(-1), KTK_LEVEL(0),  KTK_LEVEL(1),  KTK_LEVEL(2),  KTK_LEVEL(3),
    KTK_LEVEL(4),   KTK_LEVEL(5),  KTK_LEVEL(7),  KTK_LEVEL(9)};
static const int8_t ktk_multipliers[16]
    __attribute__((aligned(16))) = {5, 6, 7, 8, 9, 10, 11, 12, -5, -6, -7, -8, -9, -10, -11, -12};

#endif
