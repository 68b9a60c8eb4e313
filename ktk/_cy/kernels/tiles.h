/* AMX instructions that the tile kernels share. Assembly instead of intrinsics: GCC keeps the order
 * that is written. "memory": the compiler must not move stores to what a tile reads, or loads of
 * what it wrote, past it. */
#ifndef KTK_TILES_H
#define KTK_TILES_H

#include <stdint.h>

#define TILE_LOAD(T, FROM, STRIDE)                                                                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T::"r"(FROM), "r"((int64_t)(STRIDE)) : "memory")
#define TILE_STORE(T, TO, STRIDE)                                                                  \
    __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)" ::"r"(TO), "r"((int64_t)(STRIDE))         \
                     : "memory")
#define TILE_ZERO(T) __asm__ volatile("tilezero %%tmm" #T::)
#define TILE_DOT(INSTRUCTION, C, A, B)                                                             \
    __asm__ volatile(INSTRUCTION " %%tmm" #B ", %%tmm" #A ", %%tmm" #C::)
#define TILE_RELEASE() __asm__ volatile("tilerelease" ::)

/* Tiles 0-3 are C, 4 and 5 A, 6 and 7 B: rows of C and A, and bytes of a row of A. */
static inline void tile_configure(int tile_rows, int depth) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t colsb[16];
        uint8_t rows[16];
    } c = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        c.colsb[t] = (uint16_t)(t == 4 || t == 5 ? depth : 64);
        c.rows[t] = (uint8_t)(t < 6 ? tile_rows : depth / 4);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(c));
}

#endif
