/* Products of rows with dense matrices: what linear.c and the components of a decoder layer share.
 */
#ifndef KTK_PRODUCTS_H
#define KTK_PRODUCTS_H

#include "ktk_decoder.h"
#include "operand.h"

/* y = x W^T + bias for the rows of a call. y: row i at i * stride values of dtype, `columns` of
 * them. */
typedef struct {
    const ktk_matrix *w;
    const uint8_t *panels;
    const float *bias;
    int32_t in_features, num_panels, columns, dtype;
    ktk_rows rows; /* x, as the kernel takes it */
    void *y;
    int64_t stride, first_task;
} product;

/* What runs on the pool while it is locked. A thread has float_bytes for a row in fp32, then what
 * kernels need. */
typedef struct {
    const ktk_kernels *kernels;
    ktk_pool *pool;
    int num_threads;
    int64_t num_rows;
    uint8_t *thread_buffers;
    int64_t thread_bytes, float_bytes, work_bytes;
    int32_t *row_index; /* 0, 1, 2, ... */
} crew;

static inline float *float_buffer(const crew *c, int thread) {
    return (float *)(c->thread_buffers + thread * c->thread_bytes);
}
static inline uint8_t *work_buffer(const crew *c, int thread) {
    return c->thread_buffers + thread * c->thread_bytes + c->float_bytes;
}

/* The crew's own scratch, once all else has called want_floats and want_work. */
void ktk_lay_out_crew(crew *c, arena *a);
void ktk_want_floats(crew *c, int64_t floats);
void ktk_want_work(crew *c, int64_t bytes);

/* A product of num_rows rows, for which it takes scratch, into y. */
product ktk_lay_out_product_into(crew *c, arena *a, const ktk_dense *m, int64_t num_rows, int dtype,
                                 void *y, int64_t stride);
/* Of the crew's rows, y of fp32 in whole panels. The rows of `shared` (or NULL) serve where they
 * have the same form. */
product ktk_lay_out_product(crew *c, arena *a, const ktk_dense *m, const product *shared);

/* Row x as the operand of n products. x (in_features) is the beginning of a thread's float buffer;
 * what is behind it is lost, and the last product may turn it. */
void ktk_put(const crew *c, const product *products, int n, int64_t row, float *x);

/* All n in one run of the pool. */
void ktk_multiply(crew *c, product *products, int n);

/* fn(context, row, thread) for rows [first, end): few by the caller, which then saves a run. */
void ktk_each_row(crew *c, int64_t first, int64_t end, ktk_task_fn *fn, void *context);

#endif
