/* The backward pass of the operator: gradients of tokens, routing weights and adapters. The packed
 * weights stay as they are; rounding of activations counts as the identity.
 *
 * Products with transposed weights run over the same panels: a block of k of some panels is decoded
 * in second-level cache, and all rows of an expert go over it. Of y = W x, N channels: d_x
 * [rows][k] = sum over channels of d_y * W. No expert is decoded as a whole.
 *
 * Runs of the pool one behind the other:
 *   tokens    grad to fp32                                                       -> g
 *   q         scaling * g B of down; A h again                                   -> q, adapted
 *   hidden    expert x block of h: d_h = g W_down + drop(q A); <h, d_h>; d_z = weight * d_h act'
 *   weights   d_weights = sum of <h, d_h> over blocks + <g, bias>
 *   p         scaling * d_z B of gate and up; A x again; q *= weight             -> p, adapted
 *   input     expert x block of columns: y = d_z W + drop(p A); then d_hidden = sum of a token's y
 *   adapters  expert x block of columns: d_A = sum over rows of p or q times x or h, d_B likewise
 *
 * Every sum is made by one task in a fixed order, so the bits are the same for any number of
 * threads. fp32, except that products with integer panels take d in 16 bits. */
#include "train.h"

enum { MAX_Y_BYTES = 64 << 20 };

/* Floats from row to row of at least n: rows of a tile then lie side by side in first-level cache
 * (10 % of a product's time). */
static int64_t spread(int64_t n) {
    int64_t lines = (n + 15) / 16;
    while (lines % 64 < 20 || lines % 64 > 44) lines++;
    return 16 * lines;
}

static void turn_back(const pass *b, const ktk_matrix *w, int first, int n, float *x) {
    if (w->rotation) b->op.kernels->rotate_back(x, first, n, w->rotation, w->rotation_seed);
}

/* -- the runs */

static void token_task(void *context, int64_t index, int thread) {
    (void)thread;
    const pass *b = context;
    const operation *op = &b->op;
    const int64_t hidden = op->layer->hidden_size;
    for (int64_t t = index * ROWS; t < op->num_tokens && t < (index + 1) * ROWS; t++) {
        float *g = b->g + t * b->hidden_stride;
        ktk_load_block(op->kernels, b->grad_dtype, b->grad, t * hidden, 0, 1, (int)hidden, g, 0);
        memset(g + hidden, 0, 4 * (size_t)(b->hidden_stride - hidden));
    }
}

/* d_z of rows from d_h, which lies where that of up will; columns [k, k + n). */
static void hidden_row(const pass *b, int row, int64_t block, int k, int n, float *work) {
    const operation *op = &b->op;
    const int has_gate = b->projections == 2;
    const float *z = op->z + row * op->z_row + k;
    float *d_gate = b->d_z + row * b->d_row + k, *d_up = has_gate ? d_gate + b->z_stride : d_gate;
    float *h = work, *d = work + MAX_BLOCK;
    const float weight = op->weights[op->pair_of[row]];
    op->kernels->activate_back(&op->layer->activation, has_gate ? z : NULL,
                               has_gate ? z + b->z_stride : z, d_up, n, h, has_gate ? d_gate : NULL,
                               d);
    op->kernels->product_nt(&(ktk_product_nt){.a = h,
                                              .b = d_up,
                                              .b_panel = 16,
                                              .c = b->dots + row * b->h_blocks + block,
                                              .num_rows = 1,
                                              .num_columns = 1,
                                              .num_panels = n / 16});
    for (int i = 0; i < n; i++) d_up[i] = d[i] * weight;
    for (int i = 0; has_gate && i < n; i++) d_gate[i] *= weight;
}

static void hidden_task(void *context, int64_t index, int thread) {
    const pass *b = context;
    const operation *op = &b->op;
    const ktk_layer *layer = op->layer;
    const int64_t block = index % b->h_blocks;
    const rows_of r = all_rows(b, index / b->h_blocks);
    const int k = (int)block * b->h_block, n = min_int(b->h_block, (int)b->z_stride - k);
    float *work = buffer_of(b, thread);
    float *d_h = b->d_z + r.first * b->d_row + (b->projections - 1) * b->z_stride + k;
    ktk_product_nt product = {.a = b->g,
                              .a_stride = b->hidden_stride,
                              .rows = op->token_of + r.first,
                              .c = d_h,
                              .c_stride = b->d_row,
                              .num_rows = r.count,
                              .num_columns = n};
    for (int p = 0; p < layer->num_parts; p++) {
        const ktk_part *part = &layer->parts[p];
        const panels_of of = {part->down[r.expert], layer->down.panel_bytes, part->first_down_panel,
                              part->num_down_panels};
        ktk_multiply_transposed(op->kernels, &layer->down, of, k, &product, work);
    }
    for (int m = 0; m < r.count; m++) turn_back(b, &layer->down, k, n, d_h + m * b->d_row);
    const int real = min_int(n, layer->intermediate_size - k);
    if (has_adapter(b, KTK_DOWN) && real > 0)
        ktk_add_adapter(b, &(int){KTK_DOWN}, 1, r, 1, k, real, layer->intermediate_size, d_h,
                        b->d_row, work);
    /* Padding has neither z nor gradients. */
    const int whole = real > 0 ? (int)round_up(real, 16) : 0;
    for (int m = 0; m < r.count; m++) {
        float *d_z = b->d_z + (r.first + m) * b->d_row + k;
        if (real > 0)
            hidden_row(b, r.first + m, block, k, whole, work);
        else
            b->dots[(r.first + m) * b->h_blocks + block] = 0.0f;
        for (int p = 0; p < b->projections; p++)
            memset(d_z + p * b->z_stride + max_int(real, 0), 0, 4 * (size_t)(n - max_int(real, 0)));
    }
}

static void weight_task(void *context, int64_t index, int thread) {
    (void)thread;
    const pass *b = context;
    const operation *op = &b->op;
    const ktk_layer *layer = op->layer;
    const float *const *bias = layer->parts[0].down_bias;
    const int64_t pairs = op->num_tokens * op->top_k;
    for (int64_t i = index * ROWS; i < pairs && i < (index + 1) * ROWS; i++) {
        const int32_t row = op->place[i];
        float sum = 0.0f;
        for (int k = 0; row >= 0 && k < b->h_blocks; k++) sum += b->dots[row * b->h_blocks + k];
        if (bias && row >= 0) {
            const float *g = b->g + i / op->top_k * b->hidden_stride;
            const float *of = bias[op->ids[i]];
            for (int j = 0; j < layer->hidden_size; j++) sum += g[j] * of[j];
        }
        b->d_weights[i] = sum;
    }
}

/* y (+)= d_z of one projection times its weights. */
static void multiply_input(const pass *b, rows_of r, int is_up, int k, ktk_product_nt *y,
                           float *work) {
    const ktk_layer *layer = b->op.layer;
    const int is_apart = up_is_apart(layer) && is_up;
    const ktk_matrix *w = is_apart ? &layer->up : &layer->gate_up;
    const int each = up_is_apart(layer) ? 1 : b->projections; /* panels of gate and up alternate */
    y->a = b->d_z + r.first * b->d_row + (is_up ? b->projections - 1 : 0) * b->z_stride;
    for (int p = 0; p < layer->num_parts; p++) {
        const ktk_part *part = &layer->parts[p];
        panels_of of = {is_apart ? part->up[r.expert] : part->gate_up[r.expert],
                        each * w->panel_bytes, part->first_up_panel, part->num_up_panels};
        if (is_up && each == 2) of.panels += w->panel_bytes;
        ktk_multiply_transposed(b->op.kernels, w, of, k, y, work);
    }
}

static int64_t y_blocks(const pass *b) {
    const int64_t left = b->op.layer->gate_up.padded_in - b->y_first;
    const int64_t columns = left < b->y_columns ? left : b->y_columns;
    return (columns + b->x_block - 1) / b->x_block;
}

static void input_task(void *context, int64_t index, int thread) {
    const pass *b = context;
    const ktk_layer *layer = b->op.layer;
    const int64_t blocks = y_blocks(b);
    const rows_of r = all_rows(b, index / blocks);
    const int at = (int)(index % blocks) * b->x_block, k = (int)b->y_first + at;
    const int n = min_int(b->x_block, layer->gate_up.padded_in - k);
    float *work = buffer_of(b, thread);
    float *y = b->y + r.first * b->y_row + at;
    ktk_product_nt product = {
        .a_stride = b->d_row, .c = y, .c_stride = b->y_row, .num_rows = r.count, .num_columns = n};
    if (b->projections == 2) multiply_input(b, r, 0, k, &product, work);
    multiply_input(b, r, 1, k, &product, work);
    for (int m = 0; m < r.count; m++) turn_back(b, &layer->gate_up, k, n, y + m * b->y_row);
    const int real = min_int(n, layer->hidden_size - k);
    if (real > 0)
        ktk_add_adapter(b, (int[]){KTK_GATE, KTK_UP}, 2, r, 0, k, real, layer->hidden_size, y,
                        b->y_row, work);
}

static void sum_task(void *context, int64_t index, int thread) {
    const pass *b = context;
    const operation *op = &b->op;
    const int64_t hidden = op->layer->hidden_size, left = hidden - b->y_first;
    const int64_t n = left < b->y_columns ? left : b->y_columns;
    float *acc = buffer_of(b, thread);
    for (int64_t t = index * 16; t < op->num_tokens && t < (index + 1) * 16; t++)
        for (int64_t column = 0; column < n; column += ADAPTER_STEP) {
            const int64_t width = min_int(ADAPTER_STEP, (int)(n - column));
            op->kernels->combine(b->y + column, b->y_row, op->place + t * op->top_k, b->ones,
                                 op->top_k, (int)round_up(width, 16), acc);
            memcpy(b->d_hidden + t * hidden + b->y_first + column, acc, 4 * (size_t)width);
        }
}

/* -- a chunk of tokens */

static int64_t work_floats(const pass *b) {
    const int64_t rank = b->rank;
    int64_t most = ktk_transposed_floats();
    const int64_t others[] = {(ROWS + rank) * ADAPTER_STEP, ROWS * COLUMNS + 3 * rank * COLUMNS,
                              (ROWS + rank) * MAX_BLOCK};
    for (int i = 0; i < 3; i++)
        if (most < others[i]) most = others[i];
    return most + b->z_stride;
}

static void lay_out(pass *b, arena *a) {
    operation *op = &b->op;
    const ktk_layer *layer = op->layer;
    const int64_t tokens = op->num_tokens, pairs = tokens * op->top_k;
    b->projections = num_projections(layer);
    b->rank = op->lora ? padded_rank(op->lora) : 0;
    b->z_stride = layer->down.padded_in;
    op->z_row = b->projections * b->z_stride;
    b->hidden_stride = spread(layer->hidden_size);
    b->d_row = spread(op->z_row);
    b->h_block = ktk_transposed_block(op->kernels, &layer->down);
    b->x_block = ktk_transposed_block(op->kernels, &layer->gate_up);
    if (up_is_apart(layer))
        b->x_block = max_int(b->x_block, ktk_transposed_block(op->kernels, &layer->up));
    b->h_blocks = (int)((b->z_stride + b->h_block - 1) / b->h_block);
    b->y_columns = round_up(layer->gate_up.padded_in, b->x_block);
    const int64_t most = MAX_Y_BYTES / 4 / (pairs ? pairs : 1) / b->x_block * b->x_block;
    if (b->y_columns > most) b->y_columns = most > b->x_block ? most : b->x_block;
    op->place = take(a, 4 * pairs);
    op->token_of = take(a, 4 * pairs);
    op->row_index = take(a, 4 * pairs);
    op->pair_of = take(a, 4 * pairs);
    op->first_row = take(a, 4 * ((int64_t)layer->num_experts + 1));
    op->order = take(a, 8 * (int64_t)layer->num_experts);
    ktk_take_adapted(a, op, pairs);
    b->g = take(a, 4 * tokens * b->hidden_stride);
    b->d_z = take(a, 4 * pairs * b->d_row);
    b->dots = take(a, 4 * pairs * b->h_blocks);
    for (int p = 0; p < KTK_PROJECTIONS; p++)
        if (has_adapter(b, p)) b->small[p] = take(a, 4 * pairs * b->rank);
    b->y_row = spread(b->y_columns);
    b->y = take(a, 4 * pairs * b->y_row);
    b->ones = take(a, 4 * (int64_t)op->top_k);
    b->pieces = take(a, (int64_t)sizeof(rows_of) * (pairs / ROWS + layer->num_experts));
    op->thread_bytes = round_up(4 * work_floats(b), 4096) + 64;
    op->thread_buffers = take(a, op->thread_bytes * op->num_threads);
}

static void cut_pieces(pass *b) {
    operation *op = &b->op;
    op->num_used = 0;
    b->num_pieces = 0;
    for (int e = 0; e < op->layer->num_experts; e++) {
        const int32_t first = op->first_row[e], end = op->first_row[e + 1];
        if (first < end) op->order[op->num_used++] = e;
        for (int32_t row = first; row < end; row += ROWS)
            b->pieces[b->num_pieces++] = (rows_of){e, row, min_int(ROWS, end - row)};
    }
}

static void run(pass *b, ktk_pool *pool, ktk_task_fn *task, int64_t num_tasks) {
    const int64_t begin[2] = {0, num_tasks};
    if (num_tasks) ktk_pool_run(pool, task, b, begin, 1);
}

static void backward_chunk(pass *b, ktk_pool *pool, const uint8_t *skip, void *scratch) {
    operation *op = &b->op;
    const ktk_layer *layer = op->layer;
    arena a = {scratch, 0};
    lay_out(b, &a);
    ktk_group_pairs(op, skip);
    cut_pieces(b);
    for (int i = 0; i < op->top_k; i++) b->ones[i] = 1.0f;
    const int64_t tokens = op->num_tokens, experts = op->num_used;
    run(b, pool, token_task, (tokens + ROWS - 1) / ROWS);
    if (has_adapter(b, KTK_DOWN)) run(b, pool, ktk_q_task, b->num_pieces);
    run(b, pool, hidden_task, experts * b->h_blocks);
    run(b, pool, weight_task, (tokens * op->top_k + ROWS - 1) / ROWS);
    if (op->lora) run(b, pool, ktk_p_task, b->num_pieces);
    for (b->y_first = 0; b->y_first < layer->gate_up.padded_in; b->y_first += b->y_columns) {
        run(b, pool, input_task, experts * y_blocks(b));
        run(b, pool, sum_task, (tokens + 15) / 16);
    }
    if (op->lora) run(b, pool, ktk_adapter_task, experts * ktk_adapter_blocks(b));
}

int ktk_moe_backward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                     int64_t num_tokens, int top_k, int dtype, const void *hidden,
                     const int64_t *ids, const float *weights, const uint8_t *skip,
                     const ktk_lora *lora, const float *z, int grad_dtype, const void *grad,
                     float *d_hidden, float *d_weights, const ktk_adapter_gradient *d_lora) {
    const int64_t chunk = ktk_tokens_of_chunk(top_k), row_values = layer->hidden_size;
    pass first = {.op = {.layer = layer,
                         .kernels = kernels,
                         .num_threads = ktk_pool_num_threads(pool),
                         .num_tokens = num_tokens < chunk ? num_tokens : chunk,
                         .top_k = top_k,
                         .dtype = dtype,
                         .lora = lora},
                  .grad_dtype = grad_dtype,
                  .d_lora = d_lora};
    pass counting = first;
    arena counted = {0};
    lay_out(&counting, &counted);
    ktk_pool_lock(pool);
    void *scratch = ktk_pool_scratch(pool, counted.used);
    int status = scratch ? KTK_DONE : KTK_NO_MEMORY;
    ktk_lock_to_read(layer);
    if (!status && !ktk_has_all(layer, num_tokens * top_k, ids, skip)) status = KTK_ABSENT;
    for (int64_t t = 0; t < num_tokens && !status; t += chunk) {
        pass b = first;
        b.op.num_tokens = num_tokens - t < chunk ? num_tokens - t : chunk;
        b.op.hidden = (const uint8_t *)hidden + t * row_values * dtype_bytes(dtype);
        b.op.ids = ids + t * top_k;
        b.op.weights = weights + t * top_k;
        b.op.first_pair = t * top_k;
        b.op.z = (float *)z + t * top_k * counting.op.z_row;
        b.grad = (const uint8_t *)grad + t * row_values * dtype_bytes(grad_dtype);
        b.d_hidden = d_hidden + t * row_values;
        b.d_weights = d_weights + t * top_k;
        backward_chunk(&b, pool, skip, scratch);
    }
    ktk_unlock(layer);
    ktk_pool_unlock(pool);
    return status;
}
