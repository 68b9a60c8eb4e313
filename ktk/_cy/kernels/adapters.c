/* Adapters of experts, in fp32: y = W x + scaling * B (A drop(x)), never W + B A.
 *
 * scaling * A drop(x), rank numbers a row, is computed before gate|up (of its inputs, the tokens)
 * and before down (of its inputs, the activated z, not rounded); B follows where the packed
 * products come out. Rows of few experts and blocks of ADAPTER_STEP columns are converted to fp32
 * on the way. */
#include "adapters.h"

int64_t ktk_adapter_floats(const ktk_lora *lora, int most_rows, int64_t h_columns) {
    if (!lora) return 0;
    const int64_t a = (int64_t)(most_rows + lora->rank) * ADAPTER_STEP;
    const int64_t b = (int64_t)padded_rank(lora) * ADAPTER_STEP;
    return (a > b ? a : b) + h_columns;
}

void ktk_take_adapted(arena *a, operation *op, int64_t num_rows) {
    if (!op->lora) return;
    op->pair_of = take(a, 4 * num_rows);
    for (int p = 0; p < KTK_PROJECTIONS; p++) {
        if (!op->lora->of[p].a) continue;
        op->adapted[p] = take(a, 4 * num_rows * padded_rank(op->lora));
        if (!a->base) op->adapted[p] = (float *)op; /* counted: only that there is one */
    }
}

void ktk_load_block(const ktk_kernels *kernels, int dtype, const void *from, int64_t first,
                    int64_t stride, int rows, int n, float *to, int64_t to_stride) {
    const int whole = (int)round_up(n, 16);
    for (int i = 0; i < rows; i++, to += to_stride) {
        const int64_t at = (first + i * stride) * dtype_bytes(dtype);
        kernels->load(dtype, (const uint8_t *)from + at, n, to);
        memset(to + n, 0, 4 * (size_t)(whole - n));
    }
}

static void drop_row(const operation *op, int row, int is_down, int column, int n, float *x) {
    const ktk_dropout *d = &op->lora->dropout;
    if (!d->threshold) return;
    const int64_t pair = op->first_pair + op->pair_of[row];
    op->kernels->drop(d, (uint32_t)(2 * pair + is_down), column, (int)round_up(n, 16), x);
}

void ktk_load_x(const operation *op, int first, int count, int column, int n, float *to,
                int64_t to_stride) {
    const int64_t hidden = op->layer->hidden_size;
    for (int i = 0; i < count; i++, to += to_stride) {
        ktk_load_block(op->kernels, op->dtype, op->hidden,
                       op->token_of[first + i] * hidden + column, 0, 1, n, to, 0);
        if (op->lora) drop_row(op, first + i, 0, column, n, to);
    }
}

void ktk_load_h(const operation *op, int first, int count, int column, int n, float *to,
                int64_t to_stride) {
    const ktk_layer *layer = op->layer;
    const int whole = (int)round_up(n, 16), has_gate = layer->activation.has_gate;
    for (int i = 0; i < count; i++, to += to_stride) {
        const float *z = op->z + (first + i) * op->z_row + column;
        op->kernels->activate(&layer->activation, has_gate ? z : NULL,
                              has_gate ? z + layer->down.padded_in : z, KTK_PANEL,
                              whole / KTK_PANEL, NULL, NULL, to);
        memset(to + n, 0, 4 * (size_t)(whole - n));
        if (op->lora) drop_row(op, first + i, 1, column, n, to);
    }
}

/* adapted[projection] (+)= scaling * A x for columns [column, column + n) of x, which lie
 * ADAPTER_STEP apart. */
static void multiply_a(const operation *op, int projection, int expert, int first, int count,
                       int64_t in_features, int column, int n, const float *x, float *work) {
    const ktk_lora *lora = op->lora;
    if (!lora->of[projection].a) return;
    const int rank = lora->rank, width = padded_rank(lora);
    float *to = op->adapted[projection] + (int64_t)first * width;
    if (!column) memset(to, 0, 4 * (size_t)count * width);
    ktk_load_block(op->kernels, lora->dtype, lora->of[projection].a,
                   (int64_t)expert * rank * in_features + column, in_features, rank, n, work,
                   ADAPTER_STEP);
    op->kernels->product_nt(&(ktk_product_nt){.a = x,
                                              .a_stride = ADAPTER_STEP,
                                              .b = work,
                                              .b_panel = 16,
                                              .b_column = ADAPTER_STEP,
                                              .c = to,
                                              .c_stride = width,
                                              .num_rows = count,
                                              .num_columns = rank,
                                              .num_panels = (n + 15) / 16,
                                              .is_added = column > 0});
    if (column + n == in_features)
        for (int64_t i = 0; i < (int64_t)count * width; i++) to[i] *= lora->scaling;
}

void ktk_adapt_x(const operation *op, int expert, int first, int count, float *work) {
    const int hidden = op->layer->hidden_size;
    float *a = work + (int64_t)count * ADAPTER_STEP;
    for (int column = 0; column < hidden; column += ADAPTER_STEP) {
        const int n = min_int(ADAPTER_STEP, hidden - column);
        ktk_load_x(op, first, count, column, n, work, ADAPTER_STEP);
        for (int p = KTK_GATE; p <= KTK_UP; p++)
            multiply_a(op, p, expert, first, count, hidden, column, n, work, a);
    }
}

void ktk_adapt_h(const operation *op, int expert, int first, int count, float *work) {
    const int width = op->layer->intermediate_size;
    float *a = work + (int64_t)count * ADAPTER_STEP;
    for (int column = 0; column < width; column += ADAPTER_STEP) {
        const int n = min_int(ADAPTER_STEP, width - column);
        ktk_load_h(op, first, count, column, n, work, ADAPTER_STEP);
        multiply_a(op, KTK_DOWN, expert, first, count, width, column, n, work, a);
    }
}

static float *adapter_buffer(const operation *op, int thread) {
    return floats_of(op, thread) + op->adapter_offset / 4;
}

void ktk_adapt_x_task(operation *op, int64_t index, int thread) {
    const task *t = &op->tasks[index];
    ktk_adapt_x(op, t->expert, t->first, t->count, adapter_buffer(op, thread));
}

void ktk_adapt_h_task(operation *op, int64_t index, int thread) {
    const task *t = &op->tasks[index];
    ktk_adapt_h(op, t->expert, t->first, t->count, adapter_buffer(op, thread));
}

/* y, rows `stride` apart, += B adapted for rows [column, column + n) of B, which come in panels
 * `step` floats apart. */
static void multiply_b(const operation *op, int projection, const task *t, int64_t out_features,
                       int column, int n, float *y, int64_t stride, int step, float *work) {
    const ktk_lora *lora = op->lora;
    const int width = padded_rank(lora);
    n = min_int(n, (int)out_features - column);
    if (n <= 0) return;
    ktk_load_block(op->kernels, lora->dtype, lora->of[projection].b,
                   ((int64_t)t->expert * out_features + column) * lora->rank, lora->rank, n,
                   lora->rank, work, width);
    for (int j = 0; j < n; j += KTK_PANEL)
        op->kernels->product_nt(
            &(ktk_product_nt){.a = op->adapted[projection] + (int64_t)t->first * width,
                              .a_stride = width,
                              .b = work + (int64_t)j * width,
                              .b_panel = 16,
                              .b_column = width,
                              .c = y + (int64_t)j / KTK_PANEL * step,
                              .c_stride = stride,
                              .num_rows = t->count,
                              .num_columns = min_int(KTK_PANEL, n - j),
                              .num_panels = width / 16,
                              .is_added = 1});
}

static void keep(const operation *op, const task *t, int row, const float *v, int step,
                 const float *const *bias, int column, int panels, float *z) {
    z += (t->first + row) * op->z_row + column;
    for (int p = 0; p < panels; p++, z += KTK_PANEL) {
        memcpy(z, v + (int64_t)p * step, 4 * KTK_PANEL);
        if (bias) op->kernels->add(z, bias[t->expert] + column + p * KTK_PANEL, KTK_PANEL);
    }
}

void ktk_keep_up(const operation *op, const task *t, columns *c, int column, int panels,
                 int thread) {
    const ktk_layer *layer = op->layer;
    const ktk_part *part = &layer->parts[t->part];
    float *work = adapter_buffer(op, thread);
    const int n = panels * KTK_PANEL, width = layer->intermediate_size;
    if (op->adapted[KTK_GATE])
        multiply_b(op, KTK_GATE, t, width, column, n, c->gate, c->stride, c->step, work);
    if (op->adapted[KTK_UP])
        multiply_b(op, KTK_UP, t, width, column, n, c->up, c->stride, c->step, work);
    for (int i = 0; i < t->count; i++) {
        const int64_t at = (int64_t)i * c->stride;
        if (c->gate) keep(op, t, i, c->gate + at, c->step, part->gate_bias, column, panels, op->z);
        keep(op, t, i, c->up + at, c->step, part->up_bias, column, panels,
             op->z + (c->gate ? layer->down.padded_in : 0));
    }
}

void ktk_adapt_down(const operation *op, const task *t, float *y, int thread) {
    const ktk_part *part = &op->layer->parts[t->part];
    const int column = (part->first_down_panel + t->panel) * KTK_PANEL, n = t->panels * KTK_PANEL;
    for (int j = 0; j < n; j += ADAPTER_STEP)
        multiply_b(op, KTK_DOWN, t, op->layer->hidden_size, column + j,
                   min_int(ADAPTER_STEP, n - j), y + j, n, KTK_PANEL, adapter_buffer(op, thread));
}
