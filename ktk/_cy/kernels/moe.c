/* The operator: tokens to experts and back.
 *
 *   group     counting sort of (token, slot) pairs by expert; a pair's place is its row below
 *   quantise  each token once                                                      -> x rows
 *   gate|up   task = expert x 128 columns x up to 64 rows; activation, quantised   -> h rows
 *   down      task = expert x 128 columns x up to 64 rows; bias                    -> y rows, fp32
 *   combine   per token: out = sum over slots, in top-k order, of weight * y; cast once
 *
 * Every output element is computed by the same chain of operations whatever the batch, the tasks and
 * the threads. */
#include <string.h>

#include "ktk.h"

/* KTK_ROWS is ROW(avx2) ROW(avx512) ...: setup.py writes it from the table in isa.py. */
#define ROW(isa) extern const ktk_kernels ktk_kernels_##isa;
KTK_ROWS
#undef ROW
#define ROW(isa) &ktk_kernels_##isa,
static const ktk_kernels *const ISA_ROWS[] = {KTK_ROWS NULL};

const ktk_kernels *ktk_kernels_row(int index) { return ISA_ROWS[index]; }

enum { ROW_BLOCK = 64, COMBINE_TOKENS = 4 };
/* Tokens are taken in chunks that keep the y rows below this. */
static const int64_t MAX_Y_BYTES = 128 << 20;

typedef struct {
    int32_t expert, first_row, num_rows, block;
} task;

typedef struct {
    const ktk_layer *layer;
    const ktk_kernels *kernels;
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
    task *tasks;
    ktk_rows x, h;
    float *y;
    float *thread_buffer; /* per thread */
    int64_t thread_floats;
    uint8_t *work; /* per thread, for gemm */
    int64_t work_bytes;
    int is_down;       /* ktk_moe_linear */
    float *linear_out; /* ktk_moe_linear */
} operation;

static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }
static int fine_group(const ktk_matrix *w) { return min_int(w->group_size, w->activation_group); }
static int zero_point(const ktk_matrix *w) { return w->format == KTK_INT8 ? 128 : 8; }
static int is_float(const ktk_matrix *w) { return w->format == KTK_BF16 || w->format == KTK_FP32; }

/* Bump allocation; with base NULL it only counts. */
typedef struct {
    uint8_t *base;
    int64_t used;
} arena;

static void *take(arena *a, int64_t bytes) {
    void *at = a->base ? a->base + a->used : NULL;
    a->used += round_up(bytes, 64);
    return at;
}

static ktk_rows take_rows(arena *a, const ktk_matrix *w, const ktk_kernels *kernels, int64_t num_rows) {
    static const int bytes_of[] = {1, 2, 4};
    ktk_rows r = {0};
    r.code_stride = (int64_t)w->padded_in * bytes_of[kernels->codes_kind[w->format]];
    r.codes = take(a, r.code_stride * num_rows);
    if (is_float(w)) return r;
    r.scale_stride = (w->padded_in + w->activation_group - 1) / w->activation_group;
    r.correction_stride = (w->padded_in + fine_group(w) - 1) / fine_group(w);
    r.scales = take(a, 4 * r.scale_stride * num_rows);
    r.correction = take(a, 4 * r.correction_stride * num_rows);
    return r;
}

/* Columns [column, column + n) of one row. column is a multiple of both groups. */
static void put_row(const ktk_kernels *kernels, const ktk_matrix *w, const ktk_rows *rows, int64_t row,
                    int column, const float *values, int n) {
    int kind = kernels->codes_kind[w->format];
    uint8_t *codes = rows->codes + row * rows->code_stride;
    if (is_float(w)) {
        memcpy(codes + 4 * (int64_t)column, values, 4 * (size_t)n);
        return;
    }
    int fine = fine_group(w);
    kernels->quantise(values, n, w->activation_group, fine, zero_point(w), kind,
                      codes + (int64_t)column * (kind == KTK_CODES_I16 ? 2 : 1),
                      rows->scales + row * rows->scale_stride + column / w->activation_group,
                      rows->correction + row * rows->correction_stride + column / fine);
}

static int is_finite_row(const float *x, int n) {
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000u;
}

static int64_t dtype_bytes(int dtype) { return dtype == KTK_DTYPE_F32 ? 4 : 2; }

static void quantise_token(void *context, int64_t token, int thread) {
    operation *op = context;
    const ktk_layer *layer = op->layer;
    float *x = op->thread_buffer + thread * op->thread_floats;
    int n = op->is_down ? layer->intermediate_size : layer->hidden_size;
    const ktk_matrix *w = op->is_down ? &layer->down : &layer->gate_up;
    op->kernels->load(op->dtype, (const uint8_t *)op->hidden + token * n * dtype_bytes(op->dtype), n, x);
    memset(x + n, 0, 4 * (size_t)(w->padded_in - n));
    /* Integer formats make a group with inf or NaN NaN; float ones must too: a clamp would make inf finite again. */
    if (is_float(w) && !is_finite_row(x, n))
        for (int i = 0; i < n; i++) x[i] = __builtin_nanf("");
    put_row(op->kernels, w, &op->x, token, 0, x, w->padded_in);
}

static void gate_up_task(void *context, int64_t index, int thread) {
    operation *op = context;
    const ktk_layer *layer = op->layer;
    const task t = op->tasks[index];
    const uint8_t *expert = layer->data + t.expert * layer->expert_bytes;
    float *v = op->thread_buffer + thread * op->thread_floats;
    float h[KTK_BLOCK];
    int projections = layer->activation.has_gate ? 2 : 1;
    int column = t.block * KTK_BLOCK, panel = column / KTK_PANEL;
    int panels = max_int(0, min_int(KTK_BLOCK / KTK_PANEL, layer->gate_up.num_panels - panel));
    int n = min_int(KTK_BLOCK, layer->down.padded_in - column);
    int stride = projections * panels * KTK_PANEL;
    const float *gate_bias = NULL, *up_bias = NULL;
    if (layer->gate_bias_offset >= 0) gate_bias = (const float *)(expert + layer->gate_bias_offset) + column;
    if (layer->up_bias_offset >= 0) up_bias = (const float *)(expert + layer->up_bias_offset) + column;
    op->kernels->gemm[layer->gate_up.format](
        &layer->gate_up, expert + (int64_t)panel * projections * layer->gate_up.panel_bytes,
        projections * panels, &op->x, op->token_of + t.first_row, t.num_rows, v, stride,
        op->work + thread * op->work_bytes);
    for (int i = 0; i < t.num_rows; i++) {
        op->kernels->activate(&layer->activation, v + (int64_t)i * stride, panels, gate_bias, up_bias, h);
        /* Channels past intermediate_size are padding: whatever a bias or NaN makes of them must
         * not spread.
         */
        int real = min_int(panels * KTK_PANEL, layer->intermediate_size - column);
        memset(h + real, 0, 4 * (size_t)(n - real));
        put_row(op->kernels, &layer->down, &op->h, t.first_row + i, column, h, n);
    }
}

static void down_task(void *context, int64_t index, int thread) {
    operation *op = context;
    const ktk_layer *layer = op->layer;
    const task t = op->tasks[index];
    const uint8_t *expert = layer->data + t.expert * layer->expert_bytes;
    int panel = t.block * (KTK_BLOCK / KTK_PANEL);
    int panels = min_int(KTK_BLOCK / KTK_PANEL, layer->down.num_panels - panel);
    int64_t stride = (int64_t)layer->down.num_panels * KTK_PANEL;
    float *y = op->y + t.first_row * stride + panel * KTK_PANEL;
    op->kernels->gemm[layer->down.format](
        &layer->down, expert + layer->down_offset + panel * layer->down.panel_bytes, panels, &op->h,
        op->row_index + t.first_row, t.num_rows, y, stride, op->work + thread * op->work_bytes);
    if (layer->down_bias_offset < 0) return;
    const float *bias = (const float *)(expert + layer->down_bias_offset) + panel * KTK_PANEL;
    for (int i = 0; i < t.num_rows; i++) op->kernels->add(y + i * stride, bias, (int64_t)panels * KTK_PANEL);
}

static void combine_task(void *context, int64_t index, int thread) {
    operation *op = context;
    int64_t n = op->layer->hidden_size, stride = (int64_t)op->layer->down.num_panels * KTK_PANEL;
    float *acc = op->thread_buffer + thread * op->thread_floats;
    int64_t begin = index * COMBINE_TOKENS, end = begin + COMBINE_TOKENS;
    for (int64_t t = begin; t < end && t < op->num_tokens; t++) {
        memset(acc, 0, 4 * (size_t)n);
        for (int64_t j = t * op->top_k; j < (t + 1) * op->top_k; j++)
            if (op->place[j] >= 0)
                op->kernels->add_scaled(acc, op->y + op->place[j] * stride, op->weights[j], n);
        if (op->add) op->kernels->add(acc, op->add + t * n, n);
        op->kernels->store(op->dtype, acc, n, (uint8_t *)op->out + t * n * dtype_bytes(op->dtype));
    }
}

/* Rows of each expert, in token order; returns their number. */
static int64_t group_pairs(operation *op, const uint8_t *skip) {
    int32_t num_experts = op->layer->num_experts;
    int64_t pairs = op->num_tokens * op->top_k;
    memset(op->first_row, 0, 4 * (size_t)(num_experts + 1));
    for (int64_t i = 0; i < pairs; i++) {
        int64_t e = op->ids[i];
        int live = e >= 0 && e < num_experts && !(skip && skip[e]);
        op->place[i] = live ? (int32_t)e : -1;
        if (live) op->first_row[e + 1]++;
    }
    for (int32_t e = 0; e < num_experts; e++) op->first_row[e + 1] += op->first_row[e];
    int64_t num_rows = op->first_row[num_experts];
    for (int64_t i = 0; i < pairs; i++) { /* first_row[e] runs ahead to first_row[e + 1] ... */
        if (op->place[i] < 0) continue;
        int32_t row = op->first_row[op->place[i]]++;
        op->token_of[row] = (int32_t)(i / op->top_k);
        op->place[i] = row;
    }
    for (int32_t e = num_experts; e > 0; e--)
        op->first_row[e] = op->first_row[e - 1]; /* ... and is set back */
    op->first_row[0] = 0;
    for (int64_t i = 0; i < num_rows; i++) op->row_index[i] = (int32_t)i;
    return num_rows;
}

static int64_t make_tasks(operation *op, int num_blocks) {
    int64_t n = 0;
    for (int32_t e = 0; e < op->layer->num_experts; e++)
        for (int32_t row = op->first_row[e]; row < op->first_row[e + 1]; row += ROW_BLOCK)
            for (int b = 0; b < num_blocks; b++)
                op->tasks[n++] = (task){e, row, min_int(ROW_BLOCK, op->first_row[e + 1] - row), b};
    return n;
}

static int blocks_of(int64_t columns) { return (int)((columns + KTK_BLOCK - 1) / KTK_BLOCK); }

static void take_groups(arena *a, operation *op, int64_t pairs, int num_blocks) {
    int64_t num_experts = op->layer->num_experts;
    op->place = take(a, 4 * pairs);
    op->token_of = take(a, 4 * pairs);
    op->row_index = take(a, 4 * pairs);
    op->first_row = take(a, 4 * (num_experts + 1));
    int64_t most = pairs / ROW_BLOCK + (pairs < num_experts ? pairs : num_experts);
    op->tasks = take(a, (int64_t)sizeof(task) * most * num_blocks);
}

static int forward_chunk(operation *op, ktk_pool *pool, const uint8_t *skip) {
    const ktk_layer *layer = op->layer;
    int64_t pairs = op->num_tokens * op->top_k;
    int up_blocks = blocks_of(layer->down.padded_in),
        down_blocks = blocks_of(layer->down.num_panels * KTK_PANEL);
    int64_t y_stride = (int64_t)layer->down.num_panels * KTK_PANEL;
    op->thread_floats =
        round_up(max_int(max_int(layer->gate_up.padded_in, (int)y_stride), 2 * ROW_BLOCK * KTK_BLOCK), 16);
    op->work_bytes = KTK_WORK_BYTES(max_int(layer->gate_up.padded_in, layer->down.padded_in));
    arena a = {0};
    for (int pass = 0; pass < 2; pass++) { /* count, then hand out */
        take_groups(&a, op, pairs, max_int(up_blocks, down_blocks));
        op->x = take_rows(&a, &layer->gate_up, op->kernels, op->num_tokens);
        op->h = take_rows(&a, &layer->down, op->kernels, pairs);
        op->y = take(&a, 4 * y_stride * pairs);
        op->thread_buffer = take(&a, 4 * op->thread_floats * ktk_pool_num_threads(pool));
        op->work = take(&a, op->work_bytes * ktk_pool_num_threads(pool));
        if (pass == 0) {
            void *base = ktk_pool_scratch(pool, a.used);
            if (!base) return 1;
            a = (arena){base, 0};
        }
    }
    group_pairs(op, skip);
    ktk_pool_run(pool, quantise_token, op, op->num_tokens);
    ktk_pool_run(pool, gate_up_task, op, make_tasks(op, up_blocks));
    ktk_pool_run(pool, down_task, op, make_tasks(op, down_blocks));
    ktk_pool_run(pool, combine_task, op, (op->num_tokens + COMBINE_TOKENS - 1) / COMBINE_TOKENS);
    return 0;
}

int ktk_moe_forward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int64_t num_tokens,
                    int top_k, int dtype, const void *hidden, const int64_t *ids, const float *weights,
                    const uint8_t *skip, const float *add, void *out) {
    int64_t chunk = MAX_Y_BYTES / (4 * (int64_t)top_k * layer->down.num_panels * KTK_PANEL);
    if (chunk < 1) chunk = 1;
    int64_t row_bytes = layer->hidden_size * dtype_bytes(dtype);
    int status = 0;
    ktk_pool_lock(pool);
    for (int64_t t = 0; t < num_tokens && !status; t += chunk) {
        operation op = {
            .layer = layer,
            .kernels = kernels,
            .num_tokens = num_tokens - t < chunk ? num_tokens - t : chunk,
            .top_k = top_k,
            .dtype = dtype,
            .hidden = (const uint8_t *)hidden + t * row_bytes,
            .ids = ids + t * top_k,
            .weights = weights + t * top_k,
            .add = add ? add + t * layer->hidden_size : NULL,
            .out = (uint8_t *)out + t * row_bytes,
        };
        status = forward_chunk(&op, pool, skip);
    }
    ktk_pool_unlock(pool);
    return status;
}

static void linear_task(void *context, int64_t index, int thread) {
    operation *op = context;
    const ktk_layer *layer = op->layer;
    const ktk_matrix *w = op->is_down ? &layer->down : &layer->gate_up;
    const task t = op->tasks[index];
    int projections = !op->is_down && layer->activation.has_gate ? 2 : 1;
    int width = op->is_down ? layer->hidden_size : layer->intermediate_size;
    int column = t.block * KTK_BLOCK, panel = column / KTK_PANEL;
    int panels = min_int(KTK_BLOCK / KTK_PANEL, w->num_panels - panel),
        stride = projections * panels * KTK_PANEL;
    float *v = op->thread_buffer + thread * op->thread_floats;
    const uint8_t *expert =
        layer->data + t.expert * layer->expert_bytes + (op->is_down ? layer->down_offset : 0);
    op->kernels->gemm[w->format](w, expert + (int64_t)panel * projections * w->panel_bytes,
                                 projections * panels, &op->x, op->token_of + t.first_row, t.num_rows, v,
                                 stride, op->work + thread * op->work_bytes);
    for (int i = 0; i < t.num_rows; i++)
        for (int p = 0; p < projections * panels; p++) {
            int at = column + p / projections * KTK_PANEL;
            float *row = op->linear_out +
                         ((int64_t)op->token_of[t.first_row + i] * projections + p % projections) * width;
            memcpy(row + at, v + (int64_t)i * stride + p * KTK_PANEL,
                   4 * (size_t)min_int(KTK_PANEL, width - at));
        }
}

int ktk_moe_linear(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int is_down,
                   int64_t num_rows, const float *x, const int64_t *ids, float *y) {
    const ktk_matrix *w = is_down ? &layer->down : &layer->gate_up;
    operation op = {.layer = layer,
                    .kernels = kernels,
                    .num_tokens = num_rows,
                    .top_k = 1,
                    .dtype = KTK_DTYPE_F32,
                    .hidden = x,
                    .ids = ids,
                    .is_down = is_down,
                    .linear_out = y};
    int blocks = blocks_of(w->num_panels * KTK_PANEL), status = 0;
    op.thread_floats = round_up(max_int(w->padded_in, 2 * ROW_BLOCK * KTK_BLOCK), 16);
    op.work_bytes = KTK_WORK_BYTES(w->padded_in);
    arena a = {0};
    ktk_pool_lock(pool);
    for (int pass = 0; pass < 2 && !status; pass++) {
        take_groups(&a, &op, num_rows, blocks);
        op.x = take_rows(&a, w, kernels, num_rows);
        op.thread_buffer = take(&a, 4 * op.thread_floats * ktk_pool_num_threads(pool));
        op.work = take(&a, op.work_bytes * ktk_pool_num_threads(pool));
        if (pass == 0) {
            void *base = ktk_pool_scratch(pool, a.used);
            status = base == NULL;
            a = (arena){base, 0};
        }
    }
    if (!status) {
        group_pairs(&op, NULL);
        ktk_pool_run(pool, quantise_token, &op, num_rows);
        ktk_pool_run(pool, linear_task, &op, make_tasks(&op, blocks));
    }
    ktk_pool_unlock(pool);
    return status;
}
