/* A backward pass on its way: what its runs (train.c, train_adapters.c) read and write. */
#ifndef KTK_TRAIN_H
#define KTK_TRAIN_H

#include "adapters.h"
#include "transposed.h"

/* Rows that are held at a time; columns of a task of `adapters`, most of the other tasks. */
enum { ROWS = KTK_TRANSPOSED_ROWS, COLUMNS = 256, MAX_BLOCK = 256 };

/* Rows of one expert. */
typedef struct {
    int32_t expert, first, count;
} rows_of;

typedef struct {
    operation op; /* groups of the chunk's pairs, buffers */
    const void *grad;
    int grad_dtype;
    float *d_hidden, *d_weights;
    const ktk_adapter_gradient *d_lora;
    int projections, rank; /* rank in whole vectors */
    int64_t z_stride, d_row, hidden_stride;
    int h_block, x_block; /* k of a task of hidden, of input */
    int h_blocks;
    float *g;                      /* (tokens, hidden_stride) */
    float *d_z;                    /* (rows, d_row): projections x z_stride */
    float *dots;                   /* (rows, h_blocks) */
    float *small[KTK_PROJECTIONS]; /* (rows, rank): p of gate and up, q */
    float *y;                      /* (rows, y_row): y_columns from y_first on */
    float *ones;                   /* (top_k) */
    int64_t y_columns, y_row, y_first;
    rows_of *pieces; /* of up to ROWS each */
    int64_t num_pieces;
} pass;

static inline float *buffer_of(const pass *b, int thread) { return floats_of(&b->op, thread); }

static inline rows_of all_rows(const pass *b, int64_t i) {
    const int e = b->op.order[i];
    return (rows_of){e, b->op.first_row[e], b->op.first_row[e + 1] - b->op.first_row[e]};
}

static inline int has_adapter(const pass *b, int projection) {
    return b->op.lora && b->op.lora->of[projection].a;
}

/* -- adapters (train_adapters.c) */

/* y of rows (+)= small A for columns [column, column + n), dropped as A's inputs were. work: n wide
 * blocks of ROWS rows and of A. */
void ktk_add_adapter(const pass *b, const int *projections, int num_projections, rows_of r,
                     int is_down, int column, int n, int64_t in_features, float *y,
                     int64_t y_stride, float *work);

/* Runs of the pool, context a pass: q and p of each of its pieces, adapters of each expert's blocks
 * of columns. */
ktk_task_fn ktk_q_task, ktk_p_task, ktk_adapter_task;
int ktk_adapter_blocks(const pass *b);

#endif
