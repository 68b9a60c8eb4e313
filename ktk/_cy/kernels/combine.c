/* The operator's last step by itself: sums of experts' outputs that were computed elsewhere, by the
 * same chain of operations for each element. */
#include "ktk.h"
#include "operand.h"

/* Of a task; columns a multiple of 16. */
enum { TOKENS = 16, COLUMNS = 512 };

typedef struct {
    const ktk_kernels *kernels;
    int64_t num_tokens, hidden, stride, token_blocks;
    int top_k, dtype;
    const float *y, *weights, *add;
    const int32_t *place;
    void *out;
} combination;

static void combine_task(void *context, int64_t task, int thread) {
    (void)thread;
    const combination *c = context;
    const int64_t first = task % c->token_blocks * TOKENS,
                  column = task / c->token_blocks * COLUMNS;
    const int64_t end = min_int(first + TOKENS, c->num_tokens);
    const int64_t n = min_int(COLUMNS, c->hidden - column),
                  whole = min_int(COLUMNS, c->stride - column);
    float acc[COLUMNS];
    for (int64_t token = first; token < end; token++) {
        const int64_t pair = token * c->top_k, at = token * c->hidden + column;
        c->kernels->combine(c->y + column, c->stride, c->place + pair, c->weights + pair, c->top_k,
                            (int)whole, acc);
        if (c->add) c->kernels->add(acc, c->add + at, n);
        c->kernels->store(c->dtype, acc, n, (uint8_t *)c->out + at * dtype_bytes(c->dtype));
    }
}

void ktk_combine(const ktk_kernels *kernels, ktk_pool *pool, int64_t num_tokens, int64_t hidden,
                 int64_t stride, int top_k, int dtype, const float *y, const int32_t *place,
                 const float *weights, const float *add, void *out) {
    combination c = {.kernels = kernels,
                     .num_tokens = num_tokens,
                     .hidden = hidden,
                     .stride = stride,
                     .token_blocks = (num_tokens + TOKENS - 1) / TOKENS,
                     .top_k = top_k,
                     .dtype = dtype,
                     .y = y,
                     .weights = weights,
                     .add = add,
                     .place = place,
                     .out = out};
    const int64_t begin[2] = {0, c.token_blocks * ((hidden + COLUMNS - 1) / COLUMNS)};
    ktk_pool_lock(pool);
    ktk_pool_run(pool, combine_task, &c, begin, 1);
    ktk_pool_unlock(pool);
}
