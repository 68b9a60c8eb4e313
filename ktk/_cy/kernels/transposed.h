/* Products with transposed weights (transposed.c), for the backward pass. */
#ifndef KTK_TRANSPOSED_H
#define KTK_TRANSPOSED_H

#include "moe.h"

enum { KTK_TRANSPOSED_ROWS = 64 }; /* that are rounded at a time */

/* Panels [first, first + count) of a projection's, `step` bytes from one to the next. */
typedef struct {
    const uint8_t *panels;
    int64_t step;
    int first, count;
} panels_of;

/* p's c[m][0 .. num_columns) (+)= sum over the panels' channels of a[rows[m]] * W[., first_k + j],
 * a the whole projection's; from then on p adds. work: ktk_transposed_floats, 64-byte aligned. */
void ktk_multiply_transposed(const ktk_kernels *kernels, const ktk_matrix *w, panels_of of,
                             int first_k, ktk_product_nt *p, float *work);
int64_t ktk_transposed_floats(void);
/* k that a call is best given: whole blocks of weights, whole blocks that turn. */
int ktk_transposed_block(const ktk_kernels *kernels, const ktk_matrix *w);

#endif
