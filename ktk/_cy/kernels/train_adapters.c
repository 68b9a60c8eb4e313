/* Adapters in the backward pass: what they add to the gradients of their inputs, q and p, and the
 * gradients of A and B. In fp32; a block of an expert's A or B is converted at a time. */
#include "train.h"

void ktk_add_adapter(const pass *b, const int *projections, int num_projections, rows_of r,
                     int is_down, int column, int n, int64_t in_features, float *y,
                     int64_t y_stride, float *work) {
    const ktk_lora *lora = b->op.lora;
    const ktk_kernels *kernels = b->op.kernels;
    const int whole = (int)round_up(n, 16);
    float *sum = work, *a = work + ROWS * MAX_BLOCK;
    for (int first = 0; first < r.count; first += ROWS, y += ROWS * y_stride) {
        const int count = min_int(ROWS, r.count - first), row = r.first + first;
        int is_added = 0;
        for (int i = 0; i < num_projections; i++) {
            const int p = projections[i];
            if (!has_adapter(b, p)) continue;
            ktk_load_block(kernels, lora->dtype, lora->of[p].a,
                           (int64_t)r.expert * lora->rank * in_features + column, in_features,
                           lora->rank, n, a, MAX_BLOCK);
            kernels->product_nn(&(ktk_product_nn){.a = b->small[p] + (int64_t)row * b->rank,
                                                  .a_row = b->rank,
                                                  .a_k = 1,
                                                  .b = a,
                                                  .b_stride = MAX_BLOCK,
                                                  .c = sum,
                                                  .c_stride = MAX_BLOCK,
                                                  .num_rows = count,
                                                  .num_columns = whole,
                                                  .num_k = lora->rank,
                                                  .is_added = is_added});
            is_added = 1;
        }
        for (int m = 0; is_added && m < count; m++) {
            const int64_t pair = b->op.first_pair + b->op.pair_of[row + m];
            if (lora->dropout.threshold)
                kernels->drop(&lora->dropout, (uint32_t)(2 * pair + is_down), column, whole,
                              sum + m * MAX_BLOCK);
            kernels->add(y + m * y_stride, sum + m * MAX_BLOCK, n);
        }
    }
}

/* small[projection] of rows += scaling * d B, d: column `column` and on of what rows have. */
static void multiply_by_b(const pass *b, int projection, rows_of r, int64_t out_features,
                          int column, int n, const float *d, int64_t d_stride, float *work) {
    const ktk_lora *lora = b->op.lora;
    ktk_load_block(b->op.kernels, lora->dtype, lora->of[projection].b,
                   ((int64_t)r.expert * out_features + column) * lora->rank, lora->rank, n,
                   lora->rank, work, b->rank);
    b->op.kernels->product_nn(
        &(ktk_product_nn){.a = d,
                          .a_row = d_stride,
                          .a_k = 1,
                          .b = work,
                          .b_stride = b->rank,
                          .c = b->small[projection] + (int64_t)r.first * b->rank,
                          .c_stride = b->rank,
                          .num_rows = r.count,
                          .num_columns = b->rank,
                          .num_k = n,
                          .is_added = column > 0});
}

static void scale_small(const pass *b, int projection, rows_of r) {
    float *x = b->small[projection] + (int64_t)r.first * b->rank;
    for (int64_t i = 0; i < (int64_t)r.count * b->rank; i++) x[i] *= b->op.lora->scaling;
}

/* Rows of g, times their weights where is_weighted. */
static void load_g(const pass *b, rows_of r, int is_weighted, int column, int n, float *to,
                   int64_t stride) {
    for (int m = 0; m < r.count; m++, to += stride) {
        const float *g = b->g + b->op.token_of[r.first + m] * b->hidden_stride + column;
        const float by = is_weighted ? b->op.weights[b->op.pair_of[r.first + m]] : 1.0f;
        for (int i = 0; i < n; i++) to[i] = g[i] * by;
    }
}

void ktk_q_task(void *context, int64_t index, int thread) {
    const pass *b = context;
    const rows_of r = b->pieces[index];
    const int hidden = b->op.layer->hidden_size;
    float *work = buffer_of(b, thread);
    ktk_adapt_h(&b->op, r.expert, r.first, r.count, work);
    for (int column = 0; column < hidden; column += ADAPTER_STEP) {
        const int n = min_int(ADAPTER_STEP, hidden - column);
        load_g(b, r, 0, column, n, work, ADAPTER_STEP);
        multiply_by_b(b, KTK_DOWN, r, hidden, column, n, work, ADAPTER_STEP,
                      work + ROWS * ADAPTER_STEP);
    }
    scale_small(b, KTK_DOWN, r);
}

void ktk_p_task(void *context, int64_t index, int thread) {
    const pass *b = context;
    const operation *op = &b->op;
    const rows_of r = b->pieces[index];
    const int width = op->layer->intermediate_size;
    float *work = buffer_of(b, thread);
    if (op->adapted[KTK_GATE] || op->adapted[KTK_UP])
        ktk_adapt_x(op, r.expert, r.first, r.count, work);
    for (int p = KTK_GATE; p <= KTK_UP; p++) {
        if (!has_adapter(b, p)) continue;
        const float *d_z =
            b->d_z + r.first * b->d_row + (p == KTK_UP ? b->projections - 1 : 0) * b->z_stride;
        for (int column = 0; column < width; column += ADAPTER_STEP)
            multiply_by_b(b, p, r, width, column, min_int(ADAPTER_STEP, width - column),
                          d_z + column, b->d_row, work);
        scale_small(b, p, r);
    }
    for (int m = 0; has_adapter(b, KTK_DOWN) && m < r.count; m++) {
        float *q = b->small[KTK_DOWN] + (int64_t)(r.first + m) * b->rank;
        const float weight = op->weights[op->pair_of[r.first + m]];
        for (int i = 0; i < b->rank; i++) q[i] *= weight;
    }
}

/* to (rows x n, `stride` apart) += from. */
static void add_rows(const ktk_kernels *kernels, const float *from, int64_t from_stride, int rows,
                     int n, float *to, int64_t stride) {
    for (int i = 0; i < rows; i++) kernels->add(to + i * stride, from + i * from_stride, n);
}

/* sum (rows, COLUMNS) (+)= small^T x: a block of d_A, of one piece's rows. */
static void sum_a(const pass *b, int projection, int row, int count, const float *x, int n,
                  int is_added, float *sum) {
    b->op.kernels->product_nn(&(ktk_product_nn){.a = b->small[projection] + (int64_t)row * b->rank,
                                                .a_row = 1,
                                                .a_k = b->rank,
                                                .b = x,
                                                .b_stride = COLUMNS,
                                                .c = sum,
                                                .c_stride = COLUMNS,
                                                .num_rows = b->op.lora->rank,
                                                .num_columns = (int)round_up(n, 16),
                                                .num_k = count,
                                                .is_added = is_added});
}

/* sum (n, rank) (+)= d^T adapted: a block of d_B. */
static void sum_b(const pass *b, int projection, int row, int count, const float *d,
                  int64_t d_stride, int n, int is_added, float *sum) {
    b->op.kernels->product_nn(
        &(ktk_product_nn){.a = d,
                          .a_row = 1,
                          .a_k = d_stride,
                          .b = b->op.adapted[projection] + (int64_t)row * b->rank,
                          .b_stride = b->rank,
                          .c = sum,
                          .c_stride = b->rank,
                          .num_rows = n,
                          .num_columns = b->rank,
                          .num_k = count,
                          .is_added = is_added});
}

static void keep_a(const pass *b, int projection, int expert, const float *sum, int column, int n,
                   int64_t in_features) {
    const int rank = b->op.lora->rank;
    add_rows(b->op.kernels, sum, COLUMNS, rank, n,
             b->d_lora[projection].a + (int64_t)expert * rank * in_features + column, in_features);
}

static void keep_b(const pass *b, int projection, int expert, const float *sum, int column, int n,
                   int64_t out_features) {
    const int rank = b->op.lora->rank;
    add_rows(b->op.kernels, sum, b->rank, n, rank,
             b->d_lora[projection].b + (expert * out_features + column) * rank, rank);
}

/* Columns of tokens: d_A of gate and up, d_B of down. */
static void adapters_of_x(const pass *b, rows_of r, int column, int n, float *work) {
    const int hidden = b->op.layer->hidden_size, block = b->rank * COLUMNS;
    float *x = work, *of_down = work + ROWS * COLUMNS, *of_up = of_down + block;
    for (int first = 0; first < r.count; first += ROWS) {
        const rows_of piece = {r.expert, r.first + first, min_int(ROWS, r.count - first)};
        if (has_adapter(b, KTK_DOWN)) {
            load_g(b, piece, 1, column, n, x, COLUMNS);
            sum_b(b, KTK_DOWN, piece.first, piece.count, x, COLUMNS, n, first > 0, of_down);
        }
        if (!has_adapter(b, KTK_GATE) && !has_adapter(b, KTK_UP)) continue;
        ktk_load_x(&b->op, piece.first, piece.count, column, n, x, COLUMNS);
        for (int p = KTK_GATE; p <= KTK_UP; p++)
            if (has_adapter(b, p))
                sum_a(b, p, piece.first, piece.count, x, n, first > 0, of_up + p * block);
    }
    if (has_adapter(b, KTK_DOWN)) keep_b(b, KTK_DOWN, r.expert, of_down, column, n, hidden);
    for (int p = KTK_GATE; p <= KTK_UP; p++)
        if (has_adapter(b, p)) keep_a(b, p, r.expert, of_up + p * block, column, n, hidden);
}

/* Columns of the hidden layer: d_B of gate and up, d_A of down. */
static void adapters_of_h(const pass *b, rows_of r, int column, int n, float *work) {
    const operation *op = &b->op;
    const int width = op->layer->intermediate_size, block = b->rank * COLUMNS;
    float *h = work, *of_down = work + ROWS * COLUMNS, *of_up = of_down + block;
    for (int first = 0; first < r.count; first += ROWS) {
        const int row = r.first + first, count = min_int(ROWS, r.count - first);
        if (has_adapter(b, KTK_DOWN)) {
            ktk_load_h(op, row, count, column, n, h, COLUMNS);
            sum_a(b, KTK_DOWN, row, count, h, n, first > 0, of_down);
        }
        for (int p = KTK_GATE; p <= KTK_UP; p++) {
            if (!has_adapter(b, p)) continue;
            const int64_t slot = p == KTK_UP ? b->projections - 1 : 0;
            sum_b(b, p, row, count, b->d_z + row * b->d_row + slot * b->z_stride + column, b->d_row,
                  n, first > 0, of_up + p * block);
        }
    }
    if (has_adapter(b, KTK_DOWN)) keep_a(b, KTK_DOWN, r.expert, of_down, column, n, width);
    for (int p = KTK_GATE; p <= KTK_UP; p++)
        if (has_adapter(b, p)) keep_b(b, p, r.expert, of_up + p * block, column, n, width);
}

static int blocks_of(int columns) { return (columns + COLUMNS - 1) / COLUMNS; }

void ktk_adapter_task(void *context, int64_t index, int thread) {
    const pass *b = context;
    const ktk_layer *layer = b->op.layer;
    const int of_x = blocks_of(layer->hidden_size), of_h = blocks_of(layer->intermediate_size);
    const rows_of r = all_rows(b, index / (of_x + of_h));
    const int block = (int)(index % (of_x + of_h));
    const int column = (block < of_x ? block : block - of_x) * COLUMNS;
    float *work = buffer_of(b, thread);
    if (block < of_x)
        adapters_of_x(b, r, column, min_int(COLUMNS, layer->hidden_size - column), work);
    else
        adapters_of_h(b, r, column, min_int(COLUMNS, layer->intermediate_size - column), work);
}

int ktk_adapter_blocks(const pass *b) {
    return blocks_of(b->op.layer->hidden_size) + blocks_of(b->op.layer->intermediate_size);
}
