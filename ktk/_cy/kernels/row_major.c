/* Codes of panels row by row, two of 4 bits in a byte with the even one low: as checkpoints and GPU
 * kernels have them. What lies where in panels: ktk/experts/layout.py. */
#include <string.h>

#include "ktk.h"

enum { BLOCK = 64 }; /* words of a row at a time: 16 rows of them stay in L1 */

typedef struct {
    const uint8_t *codes;
    int64_t panel_stride, row_bytes, num_rows;
    int bits;
    uint8_t *out;
} unpanelling;

/* Codes (k, k + 4) of each byte to (2k, 2k + 1): eight codes in all. */
static uint32_t in_pairs(uint32_t w) {
    uint32_t half[2] = {w & 0x0F0F0F0F, (w >> 4) & 0x0F0F0F0F};
    for (int i = 0; i < 2; i++) {
        half[i] = (half[i] | half[i] >> 4) & 0x00FF00FF;
        half[i] = (half[i] | half[i] >> 8) & 0x0000FFFF;
    }
    return half[0] | half[1] << 16;
}

static void words_of(const unpanelling *u, const uint8_t *codes, uint8_t *row, int64_t first,
                     int64_t count) {
    uint32_t word, found[BLOCK];
    for (int64_t i = 0; i < count; i++) {
        memcpy(&word, codes + 4 * KTK_PANEL * (first + i), 4);
        found[i] = u->bits == 4 ? in_pairs(word) : word;
    }
    const int64_t left = u->row_bytes - 4 * first;
    memcpy(row + 4 * first, found, (size_t)(4 * count < left ? 4 * count : left));
}

static void unpanel_task(void *context, int64_t panel, int thread) {
    (void)thread;
    const unpanelling *u = context;
    const uint8_t *codes = u->codes + panel * u->panel_stride;
    const int64_t units = (u->row_bytes + 3) / 4;
    for (int64_t first = 0; first < units; first += BLOCK) {
        const int64_t count = units - first < BLOCK ? units - first : BLOCK;
        for (int64_t n = 0; n < KTK_PANEL && panel * KTK_PANEL + n < u->num_rows; n++) {
            uint8_t *row = u->out + (panel * KTK_PANEL + n) * u->row_bytes;
            words_of(u, codes + 4 * n, row, first, count);
        }
    }
}

void ktk_row_major(ktk_pool *pool, const uint8_t *codes, int64_t panel_stride, int64_t num_panels,
                   int bits, int64_t num_rows, int64_t row_bytes, uint8_t *out) {
    unpanelling u = {codes, panel_stride, row_bytes, num_rows, bits, out};
    const int64_t begin[2] = {0, num_panels};
    ktk_pool_lock(pool);
    ktk_pool_run(pool, unpanel_task, &u, begin, 1);
    ktk_pool_unlock(pool);
}
