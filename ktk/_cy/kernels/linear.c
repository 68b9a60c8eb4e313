/* y = x W^T + bias: one dense matrix, for the linear layers around the experts.
 *
 *   quantise  rows of x; few of them by the caller, which then saves a run of the pool
 *   multiply  columns x up to max_rows rows; columns outside, so that rows of a large batch meet their panels in L2
 *
 * Every output element is computed by the same chain of operations whatever the batch, the tasks and the threads. */
#include "operand.h"

/* Columns of a task, most and least; tasks for each thread below which they get narrower. */
enum { COLUMNS = 256, LEAST_COLUMNS = 64, TASKS_PER_THREAD = 16, QUANTISE_ROWS = 16 };

typedef struct {
    const ktk_matrix *w;
    const ktk_kernels *kernels;
    const uint8_t *panels;
    const float *bias;
    int64_t num_rows;
    int32_t in_features, out_features, dtype, num_threads;
    int32_t max_rows, row_blocks, panels_of_task;
    int64_t num_tasks;
    const uint8_t *x;
    uint8_t *y;
    ktk_rows rows;
    int32_t *row_index; /* 0, 1, 2, ... */
    uint8_t *thread_buffers;
    int64_t thread_bytes, work_offset;
} linear;

static float *float_buffer(const linear *op, int thread) {
    return (float *)(op->thread_buffers + thread * op->thread_bytes);
}

static void quantise_rows(const linear *op, int64_t first, int64_t end, int thread) {
    const int n = op->in_features;
    float *x = float_buffer(op, thread);
    for (int64_t i = first; i < end; i++) {
        op->kernels->load(op->dtype, op->x + i * n * dtype_bytes(op->dtype), n, x);
        memset(x + n, 0, 4 * (size_t)(op->w->padded_in - n));
        put_token(op->kernels, op->w, &op->rows, i, x);
    }
}

static void quantise_task(void *context, int64_t index, int thread) {
    const linear *op = context;
    const int64_t first = index * QUANTISE_ROWS, left = op->num_rows - first;
    quantise_rows(op, first, first + (left < QUANTISE_ROWS ? left : QUANTISE_ROWS), thread);
}

static const uint8_t *panels_of(const linear *op, int64_t index) {
    if (index >= op->num_tasks) return NULL;
    return op->panels + index / op->row_blocks * op->panels_of_task * op->w->panel_bytes;
}

static void multiply_task(void *context, int64_t index, int thread) {
    const linear *op = context;
    const int64_t block = index % op->row_blocks, row_bytes = op->out_features * dtype_bytes(op->dtype);
    const int64_t first = op->num_rows * block / op->row_blocks; /* blocks of nearly equal height */
    const int count = (int)(op->num_rows * (block + 1) / op->row_blocks - first);
    const int panel = (int)(index / op->row_blocks) * op->panels_of_task;
    const int panels = min_int(op->panels_of_task, op->w->num_panels - panel), column = panel * KTK_PANEL;
    const int stride = panels * KTK_PANEL, n = min_int(stride, op->out_features - column);
    float *v = float_buffer(op, thread);
    uint8_t *work = op->thread_buffers + thread * op->thread_bytes + op->work_offset;
    op->w->gemm(&(ktk_gemm_args){op->w, panels_of(op, index), panels, &op->rows, op->row_index + first, count,
                                 v, stride, panels_of(op, index + op->num_threads), work});
    for (int i = 0; i < count; i++) {
        float *row = v + (int64_t)i * stride;
        if (op->bias) op->kernels->add(row, op->bias + column, n);
        op->kernels->store(op->dtype, row, n,
                           op->y + (first + i) * row_bytes + column * dtype_bytes(op->dtype));
    }
}

int ktk_linear_forward(const ktk_matrix *w, const uint8_t *panels, const float *bias, int in_features,
                       int out_features, const ktk_kernels *kernels, ktk_pool *pool, int64_t num_rows,
                       int dtype, const void *x, void *y) {
    linear op = {.w = w,
                 .kernels = kernels,
                 .panels = panels,
                 .bias = bias,
                 .num_rows = num_rows,
                 .in_features = in_features,
                 .out_features = out_features,
                 .dtype = dtype,
                 .num_threads = ktk_pool_num_threads(pool),
                 .max_rows = w->max_rows,
                 .x = x,
                 .y = y};
    op.row_blocks = (int32_t)((num_rows + op.max_rows - 1) / op.max_rows);
    int columns = COLUMNS;
    while (columns > LEAST_COLUMNS && (int64_t)op.row_blocks * w->num_panels * KTK_PANEL <
                                          (int64_t)TASKS_PER_THREAD * op.num_threads * columns)
        columns /= 2;
    op.panels_of_task = columns / KTK_PANEL;
    op.num_tasks = (int64_t)op.row_blocks * ((w->num_panels + op.panels_of_task - 1) / op.panels_of_task);
    op.work_offset = round_up(4 * (int64_t)max_int(w->padded_in, op.max_rows * COLUMNS), 64);
    op.thread_bytes = round_up(op.work_offset + w->work_bytes, 4096) + 64;
    ktk_pool_lock(pool);
    int status = 0;
    arena a = {0};
    for (int pass = 0; pass < 2 && !status; pass++) { /* count, then hand out */
        op.rows = take_rows(&a, w, num_rows);
        op.row_index = take(&a, 4 * num_rows);
        op.thread_buffers = take(&a, op.thread_bytes * op.num_threads);
        if (pass == 0) {
            void *base = ktk_pool_scratch(pool, a.used);
            status = base == NULL;
            a = (arena){base, 0};
        }
    }
    if (!status) {
        for (int64_t i = 0; i < num_rows; i++) op.row_index[i] = (int32_t)i;
        if (num_rows <= op.num_threads) {
            const unsigned callers = ktk_float_mode_enter();
            quantise_rows(&op, 0, num_rows, 0);
            ktk_float_mode_leave(callers);
        } else {
            const int64_t begin[] = {0, (num_rows + QUANTISE_ROWS - 1) / QUANTISE_ROWS};
            ktk_pool_run(pool, quantise_task, &op, begin, 1);
        }
        const int64_t begin[] = {0, op.num_tasks};
        ktk_pool_run(pool, multiply_task, &op, begin, 1);
    }
    ktk_pool_unlock(pool);
    return status;
}
