/* The operator: tokens to experts and back, one list of tasks in one run of the pool.
 *
 *   group     counting sort of (token, slot) pairs by expert; a pair's place is its row below
 *   quantise  tokens                                                               -> x rows
 *   gate|up   expert x up to 64 rows x columns; activation, quantised              -> h rows
 *   down      expert x up to 64 rows x columns; bias                               -> y rows, fp32
 *   combine   tokens x columns: out = sum over slots, in top-k order, of weight * y; cast once
 *
 * A task waits until a counter is down to zero and lowers another when done: gate|up waits for the
 * tokens, down for its expert's gate|up, combine for its columns' down. Every list (one a NUMA
 * part) has them in this order and a thread of its own, so what a task waits for is done or being
 * done: no barrier, no deadlock. Down goes column block by column block, and combine follows one
 * block behind: y is two blocks of columns, not all of them.
 *
 * Experts that are being read come last: their gate|up waits for them. Where y is kept whole the
 * others' down goes before them.
 *
 * Every output element is computed by the same chain of operations whatever the batch, the tasks
 * and the threads. */
#include <string.h>

#include "adapters.h"
#include "moe.h"

/* Tasks for each thread below which they get narrower than the level's table says. */
enum { TASKS_PER_THREAD = 16 };
enum {
    COMBINE_TOKENS = 64,
    QUANTISE_TOKENS = 16,
    UP_STEP = 128 /* at least */
};
/* Pairs in one go: two blocks of y are then at most 64 MiB a part. MAX_WHOLE_Y: bytes up to which y
 * is kept whole. */
enum { MAX_PAIRS = 8192, MAX_WHOLE_Y = 4 << 20 };
void ktk_group_pairs(operation *op, const uint8_t *skip) {
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
        if (op->pair_of) op->pair_of[row] = (int32_t)i;
        op->place[i] = row;
    }
    for (int32_t e = num_experts; e > 0; e--)
        op->first_row[e] = op->first_row[e - 1]; /* ... and is set back */
    op->first_row[0] = 0;
    for (int64_t i = 0; i < num_rows; i++) op->row_index[i] = (int32_t)i;
}

/* An arrival may change meanwhile, so that each is looked at once. */
static void order_experts(operation *op) {
    const int32_t num_experts = op->layer->num_experts;
    int32_t *coming = op->order + num_experts;
    int num_coming = 0;
    op->num_here = 0;
    for (int32_t e = 0; e < num_experts; e++) {
        if (op->first_row[e] == op->first_row[e + 1]) continue;
        if (ktk_arrival_of(op->layer, e) == KTK_HERE)
            op->order[op->num_here++] = e;
        else
            coming[num_coming++] = e;
    }
    memcpy(op->order + op->num_here, coming, 4 * (size_t)num_coming);
    op->num_used = op->num_here + num_coming;
}

static void put_task(operation *op, task t) {
    op->tasks[op->num_tasks++] = t;
    int32_t left = atomic_load_explicit(&op->counters[t.lower], memory_order_relaxed);
    atomic_store_explicit(&op->counters[t.lower], left + 1, memory_order_relaxed);
}

static void put_quantise(operation *op, int part, int num_parts) {
    int64_t n = op->num_tokens / ((int64_t)op->num_threads * 4);
    int size = n < 1 ? 1 : n < QUANTISE_TOKENS ? (int)n : QUANTISE_TOKENS;
    int64_t begin = op->num_tokens * part / num_parts,
            end = op->num_tokens * (part + 1) / num_parts;
    for (int64_t i = begin; i < end; i += size)
        put_task(op, (task){.run = ktk_quantise_task,
                            .first = (int32_t)i,
                            .count = (int32_t)(end - i < size ? end - i : size),
                            .lower = TOKENS});
}

/* Calls that so many rows of an expert take. */
static int row_blocks(const operation *op, int rows) {
    return (rows + op->max_rows - 1) / op->max_rows;
}

/* Experts [first, end) of the order. */
typedef struct {
    int first, end;
} span;

/* The experts' part of the list: t for each one's rows and every `width` panels of [panel, end). */
static void put_experts(operation *op, span experts, task t, int panel, int end, int width) {
    for (int i = experts.first; i < experts.end; i++) {
        t.expert = op->order[i];
        if (t.run == ktk_down_task) t.wait = FIRST_EXPERT + t.expert;
        if (t.run == ktk_gate_up_task)
            t.lower = (op->first_adapted ? op->first_adapted : FIRST_EXPERT) + t.expert;
        if (t.run == ktk_adapt_h_task)
            t.wait = op->first_adapted + t.expert, t.lower = FIRST_EXPERT + t.expert;
        const int last = op->first_row[t.expert + 1];
        const int blocks = row_blocks(op, last - op->first_row[t.expert]);
        for (int b = 0; b < blocks; b++) { /* of nearly equal height */
            const int rows = last - op->first_row[t.expert];
            t.first = op->first_row[t.expert] + (int32_t)((int64_t)rows * b / blocks);
            t.count =
                op->first_row[t.expert] + (int32_t)((int64_t)rows * (b + 1) / blocks) - t.first;
            for (t.panel = panel; t.panel < end; t.panel += width) {
                t.panels = min_int(width, end - t.panel);
                put_task(op, t);
            }
        }
    }
}

static int num_blocks(const ktk_part *part, int down_columns) {
    return (part->num_down_panels * KTK_PANEL + down_columns - 1) / down_columns;
}

/* Panels of gate or up that a part makes: the last one also fills h up to a whole k group. */
static int num_up_panels(const ktk_layer *layer, const ktk_part *part) {
    int is_last = part->first_up_panel + part->num_up_panels == layer->gate_up.num_panels;
    return is_last ? layer->down.padded_in / KTK_PANEL - part->first_up_panel : part->num_up_panels;
}

/* down, combine: counters of the part's first column block. */
static void put_down(operation *op, span experts, int p, int block, int down, int combine) {
    const ktk_part *part = &op->layer->parts[p];
    const int width = op->down_columns / KTK_PANEL, first = block * width;
    const task t = {
        .run = ktk_down_task,
        .part = p,
        .wait_too = block < op->num_buffers ? NONE : combine + block - op->num_buffers,
        .lower = down + block,
        .buffer = p * op->num_buffers + block % op->num_buffers,
    };
    put_experts(op, experts, t, first, min_int(first + width, part->num_down_panels), width);
}

/* gate|up of experts, and behind it what the adapters of down make of it. */
static void put_up(operation *op, span experts, int p, int up_panels) {
    const task up = {.run = ktk_gate_up_task, .part = p, .wait = TOKENS};
    put_experts(op, experts, up, 0, up_panels, op->up_columns / KTK_PANEL);
    if (p == 0 && op->first_adapted)
        put_experts(op, experts, (task){.run = ktk_adapt_h_task}, 0, 1, 1);
}

static void put_part(operation *op, int p) {
    const ktk_layer *layer = op->layer;
    const ktk_part *part = &layer->parts[p];
    int width = op->down_columns / KTK_PANEL, blocks = num_blocks(part, op->down_columns);
    int first_block = 0, all_blocks = 0;
    for (int i = 0; i < layer->num_parts; i++) {
        if (i == p) first_block = all_blocks;
        all_blocks += num_blocks(&layer->parts[i], op->down_columns);
    }
    const int down = FIRST_EXPERT + layer->num_experts + first_block, combine = down + all_blocks;
    put_quantise(op, p, layer->num_parts);
    if (p == 0 && (op->adapted[KTK_GATE] || op->adapted[KTK_UP]))
        put_experts(op, (span){0, op->num_used}, (task){.run = ktk_adapt_x_task, .lower = TOKENS},
                    0, 1, 1);
    const int up_panels = num_up_panels(layer, part);
    /* Those before early have their down before the others' gate|up. */
    const int early = op->num_buffers >= blocks && op->num_here < op->num_used ? op->num_here : 0;
    put_up(op, (span){0, early}, p, up_panels);
    for (int b = 0; early && b < blocks; b++) put_down(op, (span){0, early}, p, b, down, combine);
    put_up(op, (span){early, op->num_used}, p, up_panels);
    for (int b = 0; b <= blocks; b++) {
        if (b < blocks) put_down(op, (span){early, op->num_used}, p, b, down, combine);
        for (int64_t token = 0; b > 0 && token < op->num_tokens; token += COMBINE_TOKENS) {
            int64_t left = op->num_tokens - token;
            put_task(op, (task){.run = ktk_combine_task,
                                .part = p,
                                .first = (int32_t)token,
                                .count = (int32_t)(left < COMBINE_TOKENS ? left : COMBINE_TOKENS),
                                .panel = (b - 1) * width,
                                .panels = min_int(width, part->num_down_panels - (b - 1) * width),
                                .wait = down + b - 1,
                                .lower = combine + b - 1,
                                .buffer = p * op->num_buffers + (b - 1) % op->num_buffers});
        }
    }
}

/* Columns of h that a task must make a multiple of: whole activation groups, whole blocks that
 * turn. */
static int up_step(const ktk_layer *layer) {
    const ktk_matrix *down = &layer->down;
    return max_int(UP_STEP, max_int(is_float(down) ? 0 : down->activation_group, down->rotation));
}

static void choose_columns(operation *op) {
    const ktk_layer *layer = op->layer;
    int64_t blocks = 0, enough = (int64_t)TASKS_PER_THREAD * op->num_threads;
    for (int e = 0; e < layer->num_experts; e++)
        blocks += row_blocks(op, op->first_row[e + 1] - op->first_row[e]);
    const ktk_task_sizes *sizes = &op->kernels->tasks;
    op->up_columns = sizes->up_panels * KTK_PANEL;
    while (op->up_columns > up_step(layer) &&
           blocks * layer->down.padded_in < enough * op->up_columns)
        op->up_columns /= 2;
    op->down_columns = sizes->down_panels * KTK_PANEL;
    while (op->down_columns > sizes->least_down_panels * KTK_PANEL &&
           blocks * layer->hidden_size < enough * op->down_columns)
        op->down_columns /= 2;
}

static void take_groups(arena *a, operation *op, int64_t pairs) {
    op->place = take(a, 4 * pairs);
    op->token_of = take(a, 4 * pairs);
    op->row_index = take(a, 4 * pairs);
    op->first_row = take(a, 4 * ((int64_t)op->layer->num_experts + 1));
    op->order = take(a, 8 * (int64_t)op->layer->num_experts);
}

static void take_tasks(arena *a, operation *op, int64_t num_tasks, int64_t num_counters) {
    op->tasks = take(a, (int64_t)sizeof(task) * num_tasks);
    op->counters = take(a, 4 * num_counters);
    if (a->base) memset((void *)op->counters, 0, 4 * (size_t)num_counters);
}

static int64_t max_int64(int64_t a, int64_t b) { return a > b ? a : b; }

static void take_thread_buffers(arena *a, operation *op) {
    const ktk_layer *layer = op->layer;
    int64_t floats = max_int(max_int(layer->gate_up.padded_in, layer->down.padded_in),
                             /* gate and up of a task */
                             2 * op->max_rows * op->kernels->tasks.up_panels * KTK_PANEL);
    op->adapter_offset = round_up(4 * floats, 64);
    floats =
        op->adapter_offset / 4 + ktk_adapter_floats(op->lora, op->max_rows, layer->down.padded_in);
    int64_t work = max_int64(layer->gate_up.work_bytes, layer->down.work_bytes);
    if (up_is_apart(layer)) work = max_int64(work, layer->up.work_bytes);
    op->work_offset = round_up(4 * floats, 64);
    op->thread_bytes = round_up(op->work_offset + work, 4096) + 64;
    op->thread_buffers = take(a, op->thread_bytes * op->num_threads);
}

static int max_rows_of(const ktk_layer *layer) {
    int rows = min_int(layer->gate_up.max_rows, layer->down.max_rows);
    return up_is_apart(layer) ? min_int(rows, layer->up.max_rows) : rows;
}

/* Most row blocks that so many pairs can make. */
static int64_t most_row_blocks(const operation *op, int64_t pairs) {
    return pairs / op->max_rows + (pairs < op->layer->num_experts ? pairs : op->layer->num_experts);
}

static void take_x(arena *a, operation *op, int64_t num_rows) {
    const ktk_layer *layer = op->layer;
    op->x = take_rows(a, op->is_down ? &layer->down : &layer->gate_up, num_rows);
    op->x_up = op->x;
    if (!op->is_down && up_has_own_rows(layer)) op->x_up = take_rows(a, &layer->up, num_rows);
}

static int run_tasks(operation *op, ktk_pool *pool) {
    ktk_pool_run(pool, ktk_run_task, op, op->list_begin, op->layer->num_parts);
    return atomic_load(&op->is_lost) ? KTK_AWAITED_IN_VAIN : KTK_DONE;
}

/* All that a chunk of tokens takes. */
static void lay_out_chunk(operation *op, arena *a) {
    const ktk_layer *layer = op->layer;
    int64_t pairs = op->num_tokens * op->top_k;
    const int least_columns = op->kernels->tasks.least_down_panels * KTK_PANEL;
    const int most_columns = op->kernels->tasks.down_panels * KTK_PANEL;
    int64_t y_columns = 0, most_blocks = 0;
    for (int p = 0; p < layer->num_parts; p++) {
        int blocks = num_blocks(&layer->parts[p], least_columns);
        most_blocks += blocks;
        if (y_columns < (int64_t)blocks * least_columns)
            y_columns = (int64_t)blocks * least_columns;
    }
    int is_whole = 4 * pairs * y_columns <= MAX_WHOLE_Y;
    if (!is_whole || y_columns < 2 * most_columns) y_columns = 2 * most_columns;
    int64_t most_tasks = most_row_blocks(op, pairs) *
                         (most_blocks + layer->down.padded_in / UP_STEP + layer->num_parts);
    most_tasks += op->num_tokens + (op->num_tokens / COMBINE_TOKENS + 1) * most_blocks;
    op->y_columns = y_columns;
    take_groups(a, op, pairs);
    if (op->lora) most_tasks += 2 * most_row_blocks(op, pairs);
    take_tasks(a, op, most_tasks, FIRST_EXPERT + 2 * layer->num_experts + 2 * most_blocks);
    ktk_take_adapted(a, op, pairs);
    if (op->lora && !op->z) op->z = take(a, 4 * pairs * op->z_row);
    if (op->adapted[KTK_DOWN])
        op->first_adapted = (int32_t)(FIRST_EXPERT + layer->num_experts + 2 * most_blocks);
    take_x(a, op, op->num_tokens);
    op->h = take_rows(a, &layer->down, pairs);
    op->y = take(a, 4 * pairs * y_columns * layer->num_parts);
    take_thread_buffers(a, op);
}

static int forward_chunk(operation *op, ktk_pool *pool, const uint8_t *skip, void *scratch) {
    const ktk_layer *layer = op->layer;
    arena a = {scratch, 0};
    lay_out_chunk(op, &a);
    ktk_group_pairs(op, skip);
    order_experts(op);
    choose_columns(op);
    op->num_buffers = (int)(op->y_columns / op->down_columns);
    for (int p = 0; p < layer->num_parts; p++) {
        op->list_begin[p] = op->num_tasks;
        put_part(op, p);
    }
    op->list_begin[layer->num_parts] = op->num_tasks;
    return run_tasks(op, pool);
}

int64_t ktk_tokens_of_chunk(int top_k) { return MAX_PAIRS / top_k < 1 ? 1 : MAX_PAIRS / top_k; }

/* What operations of one call have in common; their first chunk's tokens. */
static operation first_of(const ktk_layer *layer, const ktk_kernels *kernels, int num_threads,
                          int64_t num_tokens, int top_k, const ktk_lora *lora) {
    const int64_t chunk = ktk_tokens_of_chunk(top_k);
    return (operation){.layer = layer,
                       .kernels = kernels,
                       .num_threads = num_threads,
                       .max_rows = max_rows_of(layer),
                       .num_tokens = num_tokens < chunk ? num_tokens : chunk,
                       .top_k = top_k,
                       .lora = lora,
                       .z_row = (int64_t)num_projections(layer) * layer->down.padded_in};
}

static int64_t scratch_bytes(operation op) {
    arena counted = {0};
    lay_out_chunk(&op, &counted);
    return counted.used;
}

int64_t ktk_moe_scratch_bytes(const ktk_layer *layer, const ktk_kernels *kernels, int num_threads,
                              int64_t num_tokens, int top_k, const ktk_lora *lora) {
    return scratch_bytes(first_of(layer, kernels, num_threads, num_tokens, top_k, lora));
}

/* All chunks of num_tokens tokens, from the first on. */
static int run_chunks(operation first, ktk_pool *pool, int64_t num_tokens, const uint8_t *skip,
                      void *scratch) {
    const ktk_layer *layer = first.layer;
    const int64_t chunk = first.num_tokens, top_k = first.top_k,
                  row_bytes = layer->hidden_size * dtype_bytes(first.dtype);
    ktk_lock_to_read(layer);
    int status = ktk_has_all(layer, num_tokens * top_k, first.ids, skip) ? KTK_DONE : KTK_ABSENT;
    for (int64_t t = 0; t < num_tokens && !status; t += chunk) {
        operation op = first;
        op.num_tokens = num_tokens - t < chunk ? num_tokens - t : chunk;
        op.hidden = (const uint8_t *)first.hidden + t * row_bytes;
        op.ids = first.ids + t * top_k;
        op.weights = first.weights + t * top_k;
        op.add = first.add ? first.add + t * layer->hidden_size : NULL;
        op.out = (uint8_t *)first.out + t * row_bytes;
        op.first_pair = t * top_k;
        op.z = first.z ? first.z + op.first_pair * first.z_row : NULL;
        status = forward_chunk(&op, pool, skip, scratch);
    }
    ktk_unlock(layer);
    return status;
}

int ktk_moe_run(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                int64_t num_tokens, int top_k, int dtype, const void *hidden, const int64_t *ids,
                const float *weights, const uint8_t *skip, const ktk_lora *lora, const float *add,
                void *out, void *scratch) {
    operation op = first_of(layer, kernels, ktk_pool_num_threads(pool), num_tokens, top_k, lora);
    op.dtype = dtype;
    op.hidden = hidden;
    op.ids = ids;
    op.weights = weights;
    op.add = add;
    op.out = out;
    return run_chunks(op, pool, num_tokens, skip, scratch);
}

int ktk_moe_forward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                    int64_t num_tokens, int top_k, int dtype, const void *hidden,
                    const int64_t *ids, const float *weights, const uint8_t *skip, const float *add,
                    void *out) {
    int status = KTK_NO_MEMORY;
    ktk_pool_lock(pool);
    void *scratch =
        ktk_pool_scratch(pool, ktk_moe_scratch_bytes(layer, kernels, ktk_pool_num_threads(pool),
                                                     num_tokens, top_k, NULL));
    if (scratch)
        status = ktk_moe_run(layer, kernels, pool, num_tokens, top_k, dtype, hidden, ids, weights,
                             skip, NULL, add, out, scratch);
    ktk_pool_unlock(pool);
    return status;
}

int ktk_moe_forward_saved(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                          int64_t num_tokens, int top_k, int dtype, const void *hidden,
                          const int64_t *ids, const float *weights, const uint8_t *skip,
                          const ktk_lora *lora, float *z, void *out) {
    operation op = first_of(layer, kernels, ktk_pool_num_threads(pool), num_tokens, top_k, lora);
    op.dtype = dtype;
    op.hidden = hidden;
    op.ids = ids;
    op.weights = weights;
    op.out = out;
    op.z = z;
    ktk_pool_lock(pool);
    void *scratch = ktk_pool_scratch(pool, scratch_bytes(op));
    const int status = scratch ? run_chunks(op, pool, num_tokens, skip, scratch) : KTK_NO_MEMORY;
    ktk_pool_unlock(pool);
    return status;
}

int ktk_moe_linear(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int is_down,
                   int64_t num_rows, const float *x, const int64_t *ids, float *y) {
    const ktk_matrix *w = is_down ? &layer->down : &layer->gate_up;
    operation op = {.layer = layer,
                    .kernels = kernels,
                    .num_threads = ktk_pool_num_threads(pool),
                    .max_rows = max_rows_of(layer),
                    .num_tokens = num_rows,
                    .top_k = 1,
                    .dtype = KTK_DTYPE_F32,
                    .hidden = x,
                    .ids = ids,
                    .is_down = is_down,
                    .linear_out = y};
    int64_t most =
        most_row_blocks(&op, num_rows) * (w->num_panels * KTK_PANEL / UP_STEP + layer->num_parts);
    arena a = {0};
    ktk_pool_lock(pool);
    ktk_lock_to_read(layer);
    int status = ktk_has_all(layer, num_rows, ids, NULL) ? KTK_DONE : KTK_ABSENT;
    for (int pass = 0; pass < 2 && !status; pass++) {
        take_groups(&a, &op, num_rows);
        take_tasks(&a, &op, most + num_rows, FIRST_EXPERT + layer->num_experts);
        take_x(&a, &op, num_rows);
        take_thread_buffers(&a, &op);
        if (pass == 0) {
            void *base = ktk_pool_scratch(pool, a.used);
            status = base ? KTK_DONE : KTK_NO_MEMORY;
            a = (arena){base, 0};
        }
    }
    if (!status) {
        ktk_group_pairs(&op, NULL);
        order_experts(&op);
        for (int p = 0; p < layer->num_parts; p++) {
            const ktk_part *part = &layer->parts[p];
            op.list_begin[p] = op.num_tasks;
            put_quantise(&op, p, layer->num_parts);
            put_experts(&op, (span){0, op.num_used},
                        (task){.run = ktk_linear_task, .part = p, .wait = TOKENS, .lower = LAST}, 0,
                        is_down ? part->num_down_panels : part->num_up_panels, UP_STEP / KTK_PANEL);
        }
        op.list_begin[layer->num_parts] = op.num_tasks;
        status = run_tasks(&op, pool);
    }
    ktk_unlock(layer);
    ktk_pool_unlock(pool);
    return status;
}
