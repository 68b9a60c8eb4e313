/* Attention of rows over pages of keys and values.
 *
 *   q, k, v   inputs of the branch
 *   a row     norms, rotation; its key and value to their page
 *   attend    row x key-value head x 16 query heads x 256 tokens: partial softmax
 *   a row     chunks joined in order
 *   o         one run
 *
 * Chunks lie at fixed places, so neither pages, other rows nor threads change a row's bits. */
#include <math.h>

#include "component.h"

enum { MAX_PARTIAL = 16 << 20 }; /* bytes of partial results at a time, but one row's anyway */

static int heads_of_task(const queries *q) { return min_int(q->group, KTK_ATTEND_HEADS); }
static int blocks_of(const queries *q) {
    return (q->group + heads_of_task(q) - 1) / heads_of_task(q);
}

/* First of the tokens that a row sees. */
static int64_t first_token(const queries *q, int64_t row) {
    const int64_t before = q->s->rows->position[row] + 1 - q->window;
    return q->window && before > 0 ? before : 0;
}

static int64_t chunks_of(const queries *q, int64_t row) {
    return q->s->rows->position[row] / KTK_ATTEND_KEYS - first_token(q, row) / KTK_ATTEND_KEYS + 1;
}

/* End of the rows from `first` on whose tasks run together; *tasks: how many these are. */
static int64_t end_of_run(const queries *q, int64_t first, int64_t *tasks) {
    const int64_t task_bytes = 4 * (int64_t)heads_of_task(q) * (q->value_dim + 2);
    int64_t row = first;
    for (*tasks = 0; row < q->s->crew.num_rows; row++) {
        const int64_t more = q->num_kv_heads * blocks_of(q) * chunks_of(q, row);
        if (row > first && (*tasks + more) * task_bytes > MAX_PARTIAL) break;
        *tasks += more;
    }
    return row;
}

void ktk_lay_out_queries(queries *q, step *s, arena *a) {
    q->s = s;
    int64_t most = 0;
    for (int64_t row = 0, tasks; row < s->crew.num_rows;) {
        row = end_of_run(q, row, &tasks);
        most = tasks > most ? tasks : most;
    }
    const int64_t heads = heads_of_task(q);
    q->first_task = take(a, 8 * (s->crew.num_rows + 1));
    q->partial = take(a, 4 * most * heads * q->value_dim);
    q->most = take(a, 8 * most * heads);
    const int64_t width = ktk_attend_width(q->key_dim, q->more_dim, q->value_dim);
    ktk_want_work(&s->crew, 4 * (KTK_ATTEND_TILE * width + heads * KTK_ATTEND_KEYS));
}

static void *place_of(const step *s, const ktk_paged *pages, int64_t row, int head, int64_t token) {
    const int64_t page_tokens = s->rows->sequences[s->rows->sequence[row]].page_tokens;
    const int64_t at = head * pages->head_stride + token % page_tokens * pages->row_stride;
    return (uint8_t *)pages->pages[token / page_tokens] + at * dtype_bytes(s->dtype);
}

void ktk_cache_row(const step *s, const ktk_paged *pages, int64_t row, int head, const float *x,
                   int n) {
    s->crew.kernels->store(s->dtype, x, n, place_of(s, pages, row, head, s->rows->position[row]));
}

static ktk_tiles tiles_of(const queries *q, const ktk_paged *pages, int dim, int64_t row, int head,
                          int64_t token, int num_tiles, const void **tiles) {
    for (int i = 0; i < num_tiles; i++)
        tiles[i] = place_of(q->s, pages, row, head, token + i * KTK_ATTEND_TILE);
    return (ktk_tiles){tiles, pages->row_stride, dim};
}

static void attend_task(void *context, int64_t index, int thread) {
    const queries *q = context;
    const step *s = q->s;
    int64_t row = q->first_row;
    while (index >= q->first_task[row + 1]) row++;
    const int64_t chunks = chunks_of(q, row), heads = heads_of_task(q),
                  piece = index - q->first_task[row];
    const int64_t block = piece / chunks % blocks_of(q), kv_head = piece / chunks / blocks_of(q);
    int64_t first = first_token(q, row);
    const int64_t chunk = first / KTK_ATTEND_KEYS + piece % chunks,
                  end = s->rows->position[row] + 1;
    if (first < chunk * KTK_ATTEND_KEYS) first = chunk * KTK_ATTEND_KEYS;
    const int64_t left =
        (chunk + 1) * KTK_ATTEND_KEYS < end ? (chunk + 1) * KTK_ATTEND_KEYS - first : end - first;
    const int64_t tile = first / KTK_ATTEND_TILE * KTK_ATTEND_TILE;
    const int num_tiles = (int)((first + left - tile + KTK_ATTEND_TILE - 1) / KTK_ATTEND_TILE);
    const int width = q->key_dim + q->more_dim;
    const ktk_sequence *sequence = &s->rows->sequences[s->rows->sequence[row]];
    const void *keys[KTK_ATTEND_KEYS / KTK_ATTEND_TILE], *values[KTK_ATTEND_KEYS / KTK_ATTEND_TILE];
    ktk_attend a = {.dtype = s->dtype,
                    .group = min_int((int)heads, q->group - (int)(block * heads)),
                    .first = (int)(first - tile),
                    .count = (int)left,
                    .q = q->q + row * q->q_stride + (kv_head * q->group + block * heads) * width};
    a.keys = tiles_of(q, &sequence->keys, q->key_dim, row, (int)kv_head, tile, num_tiles, keys);
    a.values =
        tiles_of(q, &sequence->values, q->value_dim, row, (int)kv_head, tile, num_tiles, values);
    if (q->more_dim) {
        a.more = (ktk_tiles){values, sequence->values.row_stride, q->more_dim};
        a.values = a.keys;
    }
    s->crew.kernels->attend(&a, (float *)(void *)work_buffer(&s->crew, thread),
                            q->partial + index * heads * q->value_dim, q->most + index * heads * 2);
}

void ktk_attend_rows(queries *q, ktk_task_fn *fn, void *context) {
    crew *c = &q->s->crew;
    for (int64_t row = 0, tasks; row < c->num_rows;) {
        const int64_t end = end_of_run(q, row, &tasks);
        q->first_row = row;
        q->first_task[row] = 0;
        for (int64_t i = row; i < end; i++)
            q->first_task[i + 1] =
                q->first_task[i] + q->num_kv_heads * blocks_of(q) * chunks_of(q, i);
        const int64_t begin[] = {0, tasks};
        ktk_pool_run(c->pool, attend_task, q, begin, 1);
        ktk_each_row(c, row, end, fn, context);
        row = end;
    }
}

void ktk_join(const queries *q, int64_t row, int head, float *out) {
    const int64_t chunks = chunks_of(q, row), heads = heads_of_task(q), n = q->value_dim;
    const int64_t block = head / q->group * blocks_of(q) + head % q->group / heads;
    const int64_t first = (q->first_task[row] + block * chunks) * heads + head % q->group % heads;
    float most = q->sinks ? q->sinks[head] : -INFINITY;
    for (int64_t c = 0; c < chunks; c++) {
        const float own = q->most[2 * (first + c * heads)];
        most = own > most ? own : most;
    }
    float sum = q->sinks ? expf(q->sinks[head] - most) : 0.0f;
    memset(out, 0, 4 * (size_t)n);
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t at = first + c * heads;
        const float weight = expf(q->most[2 * at] - most), *partial = q->partial + at * n;
        sum += weight * q->most[2 * at + 1];
        for (int64_t i = 0; i < n; i++) out[i] += weight * partial[i];
    }
    for (int64_t i = 0; i < n; i++) out[i] /= sum;
}

enum { Q, K, V };

static void norm_heads(const ktk_norm *norm, float *x, int width) {
    if (norm->weight)
        for (int i = 0; i < width; i += norm->size) ktk_rms_norm(norm, x + i, x + i);
}

/* Queries are made ready; the key and the value go to their page. */
static void place_row(void *context, int64_t row, int thread) {
    (void)thread;
    const component *c = context;
    const ktk_attention *l = c->part;
    const ktk_decoder_rows *rows = c->s->rows;
    float *of[3];
    for (int i = 0; i < 3; i++) of[i] = (float *)c->inputs[i].y + row * c->inputs[i].stride;
    const int d = l->head_dim;
    norm_heads(&l->q_norm, of[Q], l->num_heads * d);
    norm_heads(&l->k_norm, of[K], l->num_kv_heads * d);
    for (int h = 0; h < l->num_heads; h++)
        ktk_rotate(&l->rotary, rows, row, of[Q] + h * d, of[Q] + h * d);
    for (int i = 0; i < l->num_heads * d; i++) of[Q][i] *= l->scaling;
    const ktk_sequence *sequence = &rows->sequences[rows->sequence[row]];
    for (int h = 0; h < l->num_kv_heads; h++) {
        ktk_rotate(&l->rotary, rows, row, of[K] + h * d, of[K] + h * d);
        ktk_cache_row(c->s, &sequence->keys, row, h, of[K] + h * d, d);
        ktk_cache_row(c->s, &sequence->values, row, h, of[V] + h * d, d);
    }
}

static void join_row(void *context, int64_t row, int thread) {
    const component *c = context;
    const ktk_attention *l = c->part;
    float *attended = float_buffer(&c->s->crew, thread);
    for (int h = 0; h < l->num_heads; h++)
        ktk_join(&c->queries, row, h, attended + (int64_t)h * l->head_dim);
    ktk_put(&c->s->crew, &c->output, 1, row, attended);
}

static void run_attention(component *c, float *out) {
    ktk_each_row(&c->s->crew, 0, c->s->crew.num_rows, place_row, c);
    ktk_attend_rows(&c->queries, join_row, c);
    ktk_multiply(&c->s->crew, &c->output, 1);
    ktk_add_rows(c->s, &c->output, out);
}

void ktk_lay_out_attention(component *c, arena *a) {
    const ktk_attention *l = c->part;
    c->run = run_attention;
    ktk_add_input(c->s, a, &l->q);
    ktk_add_input(c->s, a, &l->k);
    ktk_add_input(c->s, a, &l->v);
    c->queries = (queries){.num_kv_heads = l->num_kv_heads,
                           .group = l->num_heads / l->num_kv_heads,
                           .window = l->window,
                           .key_dim = l->head_dim,
                           .value_dim = l->head_dim,
                           .q = c->inputs[Q].y,
                           .q_stride = c->inputs[Q].stride,
                           .sinks = l->sinks};
    ktk_lay_out_queries(&c->queries, c->s, a);
    c->output = ktk_lay_out_product(&c->s->crew, a, &l->o, NULL);
}
