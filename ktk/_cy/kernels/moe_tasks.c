/* The tasks of moe.c: what each reads, computes and leaves behind. */
#include <sched.h>
#include <string.h>

#include "adapters.h"
#include "moe.h"

enum {
    MAX_UP_COLUMNS = KTK_MAX_UP_PANELS * KTK_PANEL,
    MAX_DOWN_COLUMNS = KTK_MAX_DOWN_PANELS * KTK_PANEL
};
enum { SPINS = 2000 }; /* pauses before a waiting thread yields */

static uint8_t *work_buffer(const operation *op, int thread) {
    return op->thread_buffers + thread * op->thread_bytes + op->work_offset;
}

void ktk_quantise_task(operation *op, int64_t index, int thread) {
    const task *t = &op->tasks[index];
    const ktk_layer *layer = op->layer;
    float *x = floats_of(op, thread);
    int n = op->is_down ? layer->intermediate_size : layer->hidden_size;
    const ktk_matrix *w = op->is_down ? &layer->down : &layer->gate_up;
    for (int64_t token = t->first; token < t->first + t->count; token++) {
        op->kernels->load(op->dtype,
                          (const uint8_t *)op->hidden + token * n * dtype_bytes(op->dtype), n, x);
        memset(x + n, 0, 4 * (size_t)(w->padded_in - n));
        if (!op->is_down && up_has_own_rows(layer))
            put_token(op->kernels, &layer->up, &op->x_up, token, x);
        put_token(op->kernels, w, &op->x, token, x);
    }
}

/* Panels of a projection of a task's expert, from the task's first on. */
static const uint8_t *up_panels(const operation *op, const task *t, int is_apart) {
    const ktk_part *part = &op->layer->parts[t->part];
    if (is_apart) return part->up[t->expert] + t->panel * op->layer->up.panel_bytes;
    const int each = part->up ? 1 : num_projections(op->layer);
    return part->gate_up[t->expert] + (int64_t)t->panel * each * op->layer->gate_up.panel_bytes;
}

static const uint8_t *down_panels(const operation *op, const task *t) {
    return op->layer->parts[t->part].down[t->expert] + t->panel * op->layer->down.panel_bytes;
}

/* First panel a task reads, NULL if it reads none. */
static const uint8_t *panels_of(const operation *op, int64_t index) {
    if (index >= op->num_tasks) return NULL;
    const task *t = &op->tasks[index];
    if (t->run == ktk_gate_up_task) return up_panels(op, t, 0);
    if (t->run == ktk_down_task) return down_panels(op, t);
    return NULL;
}

/* Gate and up of a task's rows, `panels` panels of each, into v. */
static columns multiply_up(const operation *op, const task *t, int panels, int thread, float *v,
                           const uint8_t *next) {
    const ktk_layer *layer = op->layer;
    const int32_t *rows = op->token_of + t->first;
    uint8_t *work = work_buffer(op, thread);
    const int n = num_projections(layer) * panels, stride = n * KTK_PANEL;
    const uint8_t *first = up_panels(op, t, 0);
    if (!up_is_apart(layer)) {
        layer->gate_up.gemm(&(ktk_gemm_args){&layer->gate_up, first, n, &op->x, rows, t->count, v,
                                             stride, next, work});
        if (n == panels) return (columns){NULL, v, stride, KTK_PANEL};
        return (columns){v, v + KTK_PANEL, stride, 2 * KTK_PANEL};
    }
    const uint8_t *second = up_panels(op, t, 1);
    float *up = v + panels * KTK_PANEL;
    layer->gate_up.gemm(&(ktk_gemm_args){&layer->gate_up, first, panels, &op->x, rows, t->count, v,
                                         stride, second, work});
    ktk_rows x = op->x_up;
    x.are_packed = layer->up.gemm == layer->gate_up.gemm;
    layer->up.gemm(
        &(ktk_gemm_args){&layer->up, second, panels, &x, rows, t->count, up, stride, next, work});
    return (columns){v, up, stride, KTK_PANEL};
}

static const float *bias_of(const float *const *table, const task *t, int column) {
    return table ? table[t->expert] + column : NULL;
}

void ktk_gate_up_task(operation *op, int64_t index, int thread) {
    const task *t = &op->tasks[index];
    const ktk_layer *layer = op->layer;
    const ktk_part *part = &layer->parts[t->part];
    float h[MAX_UP_COLUMNS];
    int column = (part->first_up_panel + t->panel) * KTK_PANEL;
    int panels = max_int(min_int(t->panels, part->num_up_panels - t->panel), 0);
    int n = min_int(t->panels * KTK_PANEL, layer->down.padded_in - column);
    int real = min_int(panels * KTK_PANEL, layer->intermediate_size - column);
    const float *gate_bias = bias_of(part->gate_bias, t, column),
                *up_bias = bias_of(part->up_bias, t, column);
    columns c = multiply_up(op, t, panels, thread, floats_of(op, thread),
                            panels_of(op, index + op->num_threads));
    if (op->z) ktk_keep_up(op, t, &c, column, panels, thread);
    for (int i = 0; i < t->count; i++) {
        const int64_t at = (int64_t)i * c.stride;
        op->kernels->activate(&layer->activation, c.gate ? c.gate + at : NULL, c.up + at, c.step,
                              panels, gate_bias, up_bias, h);
        /* Channels past intermediate_size are padding: whatever a bias or NaN makes of them must
         * not spread. */
        memset(h + real, 0, 4 * (size_t)(n - real));
        turn_row(op->kernels, &layer->down, column, h, n);
        put_row(op->kernels, &layer->down, &op->h, t->first + i, column, h, n);
    }
}

static float *y_buffer(const operation *op, const task *t) {
    return op->y + t->buffer * op->num_tokens * op->top_k * op->down_columns;
}

void ktk_down_task(operation *op, int64_t index, int thread) {
    const task *t = &op->tasks[index];
    const ktk_layer *layer = op->layer;
    const ktk_part *part = &layer->parts[t->part];
    int64_t stride = t->panels * KTK_PANEL;
    float *y = y_buffer(op, t) + t->first * stride;
    layer->down.gemm(&(ktk_gemm_args){
        &layer->down, panels_of(op, index), t->panels, &op->h, op->row_index + t->first, t->count,
        y, stride, panels_of(op, index + op->num_threads), work_buffer(op, thread)});
    if (op->adapted[KTK_DOWN]) ktk_adapt_down(op, t, y, thread);
    const float *bias =
        bias_of(part->down_bias, t, (part->first_down_panel + t->panel) * KTK_PANEL);
    for (int i = 0; bias && i < t->count; i++) op->kernels->add(y + i * stride, bias, stride);
}

void ktk_combine_task(operation *op, int64_t index, int thread) {
    (void)thread;
    const task *t = &op->tasks[index];
    int64_t hidden = op->layer->hidden_size, stride = t->panels * KTK_PANEL;
    int64_t column = (op->layer->parts[t->part].first_down_panel + t->panel) * KTK_PANEL;
    int64_t n = column + stride < hidden ? stride : hidden - column;
    const float *y = y_buffer(op, t);
    float acc[MAX_DOWN_COLUMNS];
    for (int64_t token = t->first; token < t->first + t->count; token++) {
        const int64_t pair = token * op->top_k;
        op->kernels->combine(y, stride, op->place + pair, op->weights + pair, op->top_k,
                             (int)stride, acc);
        int64_t at = token * hidden + column;
        if (op->add) op->kernels->add(acc, op->add + at, n);
        op->kernels->store(op->dtype, acc, n, (uint8_t *)op->out + at * dtype_bytes(op->dtype));
    }
}

static void wait_for(const operation *op, int counter, int64_t index) {
    if (atomic_load_explicit(&op->counters[counter], memory_order_acquire) <= 0) return;
    const uint8_t *panel = panels_of(op, index); /* time to fetch what the task will begin with */
    for (int64_t i = 0; panel && i < op->layer->gate_up.panel_bytes; i += 64)
        __builtin_prefetch(panel + i, 0, 2);
    for (int spins = 0; atomic_load_explicit(&op->counters[counter], memory_order_acquire) > 0;
         spins++) {
        if (spins < SPINS)
            KTK_PAUSE();
        else
            sched_yield();
    }
}

void ktk_run_task(void *context, int64_t index, int thread) {
    operation *op = context;
    const task *t = &op->tasks[index];
    wait_for(op, t->wait, index);
    wait_for(op, t->wait_too, index);
    if (op->num_here < op->num_used && (t->run == ktk_gate_up_task || t->run == ktk_linear_task) &&
        ktk_await(op->layer, t->expert) == KTK_LOST)
        atomic_store(&op->is_lost, 1);
    t->run(op, index, thread);
    atomic_fetch_sub_explicit(&op->counters[t->lower], 1, memory_order_release);
}

/* Panels of columns [column, ...) to the task's rows of the result, where they are the part-th of
 * `width` columns. */
static void put_linear(const operation *op, const task *t, const float *v, int stride, int step,
                       int column, int part, int parts, int width) {
    for (int i = 0; i < t->count; i++) {
        float *row = op->linear_out + ((int64_t)op->token_of[t->first + i] * parts + part) * width;
        for (int p = 0; p < t->panels; p++) {
            int at = column + p * KTK_PANEL;
            memcpy(row + at, v + (int64_t)i * stride + p * step,
                   4 * (size_t)min_int(KTK_PANEL, width - at));
        }
    }
}

void ktk_linear_task(operation *op, int64_t index, int thread) {
    const task *t = &op->tasks[index];
    const ktk_layer *layer = op->layer;
    const ktk_part *part = &layer->parts[t->part];
    const int first = op->is_down ? part->first_down_panel : part->first_up_panel;
    const int column = (first + t->panel) * KTK_PANEL, parts = num_projections(layer);
    float *v = floats_of(op, thread);
    if (op->is_down) {
        const int stride = t->panels * KTK_PANEL;
        layer->down.gemm(&(ktk_gemm_args){&layer->down, down_panels(op, t), t->panels, &op->x,
                                          op->token_of + t->first, t->count, v, stride, NULL,
                                          work_buffer(op, thread)});
        put_linear(op, t, v, stride, KTK_PANEL, column, 0, 1, layer->hidden_size);
        return;
    }
    columns c = multiply_up(op, t, t->panels, thread, v, NULL);
    if (c.gate)
        put_linear(op, t, c.gate, c.stride, c.step, column, 0, parts, layer->intermediate_size);
    put_linear(op, t, c.up, c.stride, c.step, column, parts - 1, parts, layer->intermediate_size);
}
