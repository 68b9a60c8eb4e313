/* An operation of moe.c on its way: what its tasks (moe_tasks.c) read and write. */
#ifndef KTK_MOE_H
#define KTK_MOE_H

#include <stdatomic.h>

#include "ktk.h"
#include "operand.h"

typedef struct operation operation;
typedef struct {
    void (*run)(operation *op, int64_t index, int thread);
    int32_t part, expert;
    int32_t first, count;          /* rows, or tokens */
    int32_t panel, panels;         /* of the part's projection */
    int32_t wait, wait_too, lower; /* counters */
    int32_t buffer;                /* of y */
} task;

/* Counters: nobody lowers NONE and nobody waits for LAST; one per expert and two per column block
 * follow. */
enum { NONE, LAST, TOKENS, FIRST_EXPERT };

struct operation {
    const ktk_layer *layer;
    const ktk_kernels *kernels;
    int num_threads, up_columns, down_columns;
    int max_rows; /* of a task */
    int64_t num_tokens;
    int32_t top_k, dtype;
    const void *hidden;
    const int64_t *ids;
    const float *weights, *add;
    void *out;
    int32_t *place;     /* (tokens, top_k): row of the pair, -1 = adds nothing */
    int32_t *token_of;  /* token of each row */
    int32_t *row_index; /* 0, 1, 2, ... */
    int32_t *first_row; /* (experts + 1) */
    int32_t *order;     /* (experts): those with rows, those that are being read last */
    int num_here, num_used;
    _Atomic int is_lost; /* an expert was awaited in vain */
    _Atomic int32_t *counters;
    task *tasks;
    int64_t num_tasks, list_begin[KTK_MAX_PARTS + 1];
    ktk_rows x, x_up, h; /* x_up: x, or where up wants other activations than gate */
    float *y;            /* (buffers, pairs, down_columns) */
    int num_buffers;     /* of a part */
    int64_t y_columns;   /* of all buffers */
    uint8_t *thread_buffers;
    int64_t thread_bytes, adapter_offset, work_offset; /* of a thread's buffers, bytes */
    /* ktk_moe_forward_saved: see there; of rows their pair of the call's, which starts with
     * first_pair; scaling * A drop(x) (rows, rank in whole vectors); counters of adapted down */
    const ktk_lora *lora;
    float *z;
    int64_t z_row, first_pair; /* floats of a row of z */
    int32_t *pair_of, first_adapted;
    float *adapted[KTK_PROJECTIONS];
    int is_down;       /* ktk_moe_linear */
    float *linear_out; /* ktk_moe_linear */
};

static inline int up_is_apart(const ktk_layer *layer) { return layer->parts[0].up != NULL; }
static inline int up_has_own_rows(const ktk_layer *layer) {
    return up_is_apart(layer) && layer->up.codes_kind != layer->gate_up.codes_kind;
}
static inline int num_projections(const ktk_layer *layer) {
    return layer->activation.has_gate ? 2 : 1;
}

/* Kinds of tasks; index: into op->tasks. */
typedef void task_fn(operation *op, int64_t index, int thread);
task_fn ktk_quantise_task, ktk_gate_up_task, ktk_down_task, ktk_combine_task, ktk_linear_task;
task_fn ktk_adapt_x_task, ktk_adapt_h_task;

static inline float *floats_of(const operation *op, int thread) {
    return (float *)(op->thread_buffers + thread * op->thread_bytes);
}

/* Tokens of a call that are run at a time, so many pairs at most. */
int64_t ktk_tokens_of_chunk(int top_k);
/* Rows of each expert, in token order: place, token_of, row_index, first_row; pair_of where there
 * is room for it. */
void ktk_group_pairs(operation *op, const uint8_t *skip);

/* Where gate and up columns lie: channel 16 * p + n of row i at i * stride + p * step + n. gate
 * NULL: there is none. */
typedef struct {
    float *gate, *up;
    int stride, step;
} columns;
/* A task of any kind, once what it waits for is done: what the pool runs. */
void ktk_run_task(void *operation, int64_t index, int thread);

/* Whether every expert that ids (num_ids) choose is there; call with the layer's lock
 * (addresses.c). */
int ktk_has_all(const ktk_layer *layer, int64_t num_ids, const int64_t *ids, const uint8_t *skip);
int ktk_is_absent(const ktk_layer *layer, int64_t expert); /* likewise */
int ktk_arrival_of(const ktk_layer *layer, int64_t expert);
int ktk_await(const ktk_layer *layer, int64_t expert); /* KTK_HERE or KTK_LOST */
void ktk_lock_to_read(const ktk_layer *layer);
void ktk_unlock(const ktk_layer *layer);

#endif
