/* Adapters of experts (adapters.c): scaling * B (A drop(x)) beside the packed products. */
#ifndef KTK_ADAPTERS_H
#define KTK_ADAPTERS_H

#include "moe.h"

enum { ADAPTER_STEP = 512 }; /* columns of A's inputs, rows of B at a time */

static inline int padded_rank(const ktk_lora *lora) { return (int)round_up(lora->rank, 16); }

/* Room of a thread for what follows, in floats. most_rows: of a call. h_columns: of an expert's
 * hidden layer. */
int64_t ktk_adapter_floats(const ktk_lora *lora, int most_rows, int64_t h_columns);

/* op->adapted and pair_of, where there are adapters. */
void ktk_take_adapted(arena *a, operation *op, int64_t num_rows);

/* rows x n values of dtype, `stride` apart, to floats `to_stride` apart, filled up with zeros to
 * whole vectors of 16. */
void ktk_load_block(const ktk_kernels *kernels, int dtype, const void *from, int64_t first,
                    int64_t stride, int rows, int n, float *to, int64_t to_stride);

/* Columns [column, column + n) of A's inputs for rows [first, first + count) of the groups, to
 * `to_stride` apart: of gate and up the tokens, of down the activated z. h: room for a row. */
void ktk_load_x(const operation *op, int first, int count, int column, int n, float *to,
                int64_t to_stride);
void ktk_load_h(const operation *op, int first, int count, int column, int n, float *to,
                int64_t to_stride);

/* op->adapted of these rows of an expert: of gate and up; of down. */
void ktk_adapt_x(const operation *op, int expert, int first, int count, float *work);
void ktk_adapt_h(const operation *op, int expert, int first, int count, float *work);

/* Parts of ktk_gate_up_task and ktk_down_task: what the adapters add, and z. column: of the
 * expert's hidden layer. */
void ktk_keep_up(const operation *op, const task *t, columns *c, int column, int panels,
                 int thread);
void ktk_adapt_down(const operation *op, const task *t, float *y, int thread);

#endif
