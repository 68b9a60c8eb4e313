/* Attention of rows over pages of keys and values.
 *
 *   q, k, v   inputs of the branch
 *   a row     norms, rotation; its key and value to their page
 *   attend    rows that follow each other x key-value head x query heads, 16 queries in all, x 256
 *             tokens: partial softmax
 *   a row     chunks joined in order
 *   o         one run
 *
 * Chunks lie at fixed places, so neither pages, other rows nor threads change a row's bits. */
#include <math.h>

#include "component.h"

enum { MAX_PARTIAL = 16 << 20 }; /* bytes of partial results at a time, but one row's anyway */

static int heads_of_task(const queries *q) { return min_int(q->group, KTK_ATTEND_QUERIES); }
static int blocks_of(const queries *q) {
    return (q->group + heads_of_task(q) - 1) / heads_of_task(q);
}

/* First of the tokens that a row sees. */
static int64_t first_token(const queries *q, int64_t row) {
    const int64_t before = q->s->rows->position[row] + 1 - q->window;
    return q->window && before > 0 ? before : 0;
}

static int64_t first_chunk(const queries *q, int64_t row) {
    return first_token(q, row) / KTK_ATTEND_KEYS;
}

static int64_t chunks_of(const queries *q, int64_t row) {
    return q->s->rows->position[row] / KTK_ATTEND_KEYS - first_chunk(q, row) + 1;
}

/* The block that begins with a row; its first task is not set. */
static row_block block_from(const queries *q, int64_t row, int64_t end) {
    const ktk_decoder_rows *rows = q->s->rows;
    const int most = max_int(1, KTK_ATTEND_QUERIES / heads_of_task(q));
    int count = 1;
    while (count < most && row + count < end &&
           rows->sequence[row + count] == rows->sequence[row] &&
           rows->position[row + count] == rows->position[row] + count)
        count++;
    const int64_t last = row + count - 1, chunk = first_chunk(q, row);
    return (row_block){.first = row,
                       .count = count,
                       .first_chunk = chunk,
                       .num_chunks = (int)(first_chunk(q, last) + chunks_of(q, last) - chunk)};
}

/* End of the rows from `first` on whose tasks run together; *partial: how many results they have.
 */
static int64_t end_of_run(const queries *q, int64_t first, int64_t *partial) {
    const int64_t bytes = 4 * (int64_t)heads_of_task(q) * (q->value_dim + 2);
    int64_t row = first;
    for (*partial = 0; row < q->s->crew.num_rows; row++) {
        const int64_t more = q->num_kv_heads * blocks_of(q) * chunks_of(q, row);
        if (row > first && (*partial + more) * bytes > MAX_PARTIAL) break;
        *partial += more;
    }
    return row;
}

void ktk_lay_out_queries(queries *q, step *s, arena *a) {
    q->s = s;
    int64_t most = 0;
    for (int64_t row = 0, partial; row < s->crew.num_rows;) {
        row = end_of_run(q, row, &partial);
        most = partial > most ? partial : most;
    }
    const int64_t heads = heads_of_task(q);
    q->first_partial = take(a, 8 * (s->crew.num_rows + 1));
    q->blocks = take(a, (int64_t)sizeof(row_block) * s->crew.num_rows);
    q->partial = take(a, 4 * most * heads * q->value_dim);
    q->most = take(a, 8 * most * heads);
    const int64_t width = ktk_attend_width(q->key_dim, q->more_dim, q->value_dim);
    ktk_want_work(&s->crew, 4 * (KTK_ATTEND_TILE * width + KTK_ATTEND_QUERIES * KTK_ATTEND_SCORES));
}

static void *place_of(const step *s, const ktk_paged *pages, int64_t row, int head, int64_t token) {
    const ktk_sequence *sequence = &s->rows->sequences[s->rows->sequence[row]];
    const int64_t page_tokens = sequence->page_tokens;
    const int64_t at = head * pages->head_stride + token % page_tokens * pages->row_stride;
    return (uint8_t *)pages->pages[token / page_tokens] + at * dtype_bytes(sequence->dtype);
}

void ktk_cache_row(const step *s, const ktk_paged *pages, int64_t row, int head, const float *x,
                   int n) {
    const int dtype = s->rows->sequences[s->rows->sequence[row]].dtype;
    uint8_t *place = place_of(s, pages, row, head, s->rows->position[row]);
    if (dtype != KTK_DTYPE_I8) {
        s->crew.kernels->store(dtype, x, n, place);
        return;
    }
    float scale;
    int32_t unused;
    s->crew.kernels->quantise(x, n, n, n, 0, KTK_CODES_I8, place, &scale, &unused);
    memcpy(place + n, &scale, KTK_ROW_SCALE);
}

static ktk_tiles tiles_of(const queries *q, const ktk_paged *pages, int dim, int64_t row, int head,
                          int64_t token, int num_tiles, const void **tiles) {
    for (int i = 0; i < num_tiles; i++)
        tiles[i] = place_of(q->s, pages, row, head, token + i * KTK_ATTEND_TILE);
    return (ktk_tiles){tiles, pages->row_stride, dim};
}

/* The queries of a block's rows over one chunk; those that see none of it are left out. Returns the
 * first token of the tiles, a multiple of KTK_ATTEND_TILE; *end: of the last query. */
static int64_t take_queries(const queries *q, const row_block *b, int64_t kv_head, int64_t part,
                            int64_t chunk, ktk_attend *a, int64_t *end) {
    const int64_t heads = heads_of_task(q), width = q->key_dim + q->more_dim;
    const int group = min_int((int)heads, q->group - (int)(part * heads));
    int64_t first[KTK_ATTEND_QUERIES], base = INT64_MAX;
    *end = 0;
    for (int64_t row = b->first; row < b->first + b->count; row++) {
        const int64_t seen = first_token(q, row), last = q->s->rows->position[row] + 1;
        const int64_t from = seen > chunk * KTK_ATTEND_KEYS ? seen : chunk * KTK_ATTEND_KEYS;
        const int64_t to =
            last < (chunk + 1) * KTK_ATTEND_KEYS ? last : (chunk + 1) * KTK_ATTEND_KEYS;
        if (from >= to) continue;
        const int64_t piece = q->first_partial[row] +
                              (kv_head * blocks_of(q) + part) * chunks_of(q, row) + chunk -
                              first_chunk(q, row);
        const float *of_row =
            q->q + row * q->q_stride + (kv_head * q->group + part * heads) * width;
        for (int g = 0; g < group; g++) {
            const int i = a->num_queries++;
            const int64_t at = piece * heads + g;
            first[i] = from;
            a->end[i] = (int32_t)(to - chunk * KTK_ATTEND_KEYS);
            a->q[i] = of_row + g * width;
            a->out[i] = q->partial + at * q->value_dim;
            a->most[i] = q->most + 2 * at;
        }
        base = from < base ? from : base;
        *end = to > *end ? to : *end;
    }
    base = base / KTK_ATTEND_TILE * KTK_ATTEND_TILE;
    for (int i = 0; i < a->num_queries; i++) {
        a->begin[i] = (int32_t)(first[i] - base);
        a->end[i] -= (int32_t)(base - chunk * KTK_ATTEND_KEYS);
    }
    return base;
}

static const row_block *block_of(const queries *q, int64_t task) {
    int low = 0;
    for (int high = q->num_blocks; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (q->blocks[middle].first_task <= task)
            low = middle;
        else
            high = middle;
    }
    return &q->blocks[low];
}

static void attend_task(void *context, int64_t index, int thread) {
    const queries *q = context;
    const step *s = q->s;
    const row_block *b = block_of(q, index);
    const int64_t piece = index - b->first_task, of_head = piece / b->num_chunks;
    const int64_t part = of_head % blocks_of(q), kv_head = of_head / blocks_of(q);
    const ktk_sequence *sequence = &s->rows->sequences[s->rows->sequence[b->first]];
    ktk_attend a = {.dtype = sequence->dtype};
    int64_t end;
    const int64_t base =
        take_queries(q, b, kv_head, part, b->first_chunk + piece % b->num_chunks, &a, &end);
    const int num_tiles = (int)((end - base + KTK_ATTEND_TILE - 1) / KTK_ATTEND_TILE);
    const void *keys[KTK_ATTEND_KEYS / KTK_ATTEND_TILE], *values[KTK_ATTEND_KEYS / KTK_ATTEND_TILE];
    const int head = (int)kv_head;
    a.keys = tiles_of(q, &sequence->keys, q->key_dim, b->first, head, base, num_tiles, keys);
    a.values =
        tiles_of(q, &sequence->values, q->value_dim, b->first, head, base, num_tiles, values);
    if (q->more_dim) {
        a.more = (ktk_tiles){values, sequence->values.row_stride, q->more_dim};
        a.values = a.keys;
    }
    s->crew.kernels->attend(&a, (float *)(void *)work_buffer(&s->crew, thread));
}

void ktk_attend_rows(queries *q, ktk_task_fn *fn, void *context) {
    crew *c = &q->s->crew;
    for (int64_t row = 0, partial; row < c->num_rows;) {
        const int64_t end = end_of_run(q, row, &partial);
        int64_t tasks = 0;
        q->first_partial[row] = 0;
        for (int64_t i = row; i < end; i++)
            q->first_partial[i + 1] =
                q->first_partial[i] + q->num_kv_heads * blocks_of(q) * chunks_of(q, i);
        q->num_blocks = 0;
        for (int64_t i = row; i < end;) {
            row_block *b = &q->blocks[q->num_blocks++];
            *b = block_from(q, i, end);
            b->first_task = tasks;
            tasks += q->num_kv_heads * blocks_of(q) * b->num_chunks;
            i += b->count;
        }
        const int64_t begin[] = {0, tasks};
        ktk_pool_run(c->pool, attend_task, q, begin, 1);
        ktk_each_row(c, row, end, fn, context);
        row = end;
    }
}

void ktk_join(const queries *q, int64_t row, int head, float *out) {
    const int64_t chunks = chunks_of(q, row), heads = heads_of_task(q), n = q->value_dim;
    const int64_t block = head / q->group * blocks_of(q) + head % q->group / heads;
    const int64_t first =
        (q->first_partial[row] + block * chunks) * heads + head % q->group % heads;
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
