/* One new token through a decoder layer: norm, attention over the cached keys, norm, routing, experts.
 *
 *   q, k, v       one run of the pool
 *   attend        key-value head x 256 keys: partial softmax; joined in order by the caller
 *   o             one run
 *   logits, and of a dense or shared MLP gate and up, then down
 *   experts       ktk_moe_forward
 *
 * In between the caller works alone: some microseconds. All in fp32; only what is cached and given back has the model's
 * dtype. Chunks of keys are fixed, so threads do not change the result. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ktk_decoder.h"
#include "operand.h"

enum { MAX_PRODUCTS = 3 }; /* of one run */
enum { TASKS_PER_THREAD = 16, PANELS = 16, LEAST_PANELS = 4 };
enum { Q, K, V, O, LOGITS, GATE, UP, DOWN, NUM_MATRICES };

/* A dense matrix at work: its quantised row, its products. */
typedef struct {
    const ktk_dense *m;
    ktk_rows rows;
    float *y; /* (16 * num_panels) */
} product;

typedef struct {
    const ktk_decoder_layer *layer;
    const ktk_kernels *kernels;
    ktk_pool *pool;
    int num_threads, dtype, group, num_chunks;
    const ktk_kv_rows *kv;
    product products[NUM_MATRICES];
    float *residual, *x, *attended, *h; /* x, attended, h: zeros behind them, up to what any matrix reads */
    float *partial, *most;              /* (num_kv_heads, num_chunks, group, head_dim), and 2 for head_dim */
    uint8_t *thread_buffers;
    int64_t thread_bytes;
    /* The products of the run going on. */
    product *running[MAX_PRODUCTS];
    int num_running;
    int64_t first_task[MAX_PRODUCTS + 1];
    int panels_of_task;
} step;

static int64_t padded(int n) { return round_up(n, 1024); } /* floats: no matrix pads its inputs by more */

static const uint8_t *panels_of(const step *s, int64_t task, int *which, int *first) {
    for (int j = 0; j < s->num_running; j++) {
        if (task >= s->first_task[j + 1]) continue;
        *which = j;
        *first = (int)(task - s->first_task[j]) * s->panels_of_task;
        const ktk_dense *m = s->running[j]->m;
        return m->panels + *first * m->w.panel_bytes;
    }
    return NULL;
}

static void product_task(void *context, int64_t index, int thread) {
    const step *s = context;
    static const int32_t row = 0;
    int which = 0, first = 0, unused;
    const uint8_t *panels = panels_of(s, index, &which, &first);
    const uint8_t *next = panels_of(s, index + s->num_threads, &unused, &unused);
    const product *p = s->running[which];
    const int many = min_int(s->panels_of_task, p->m->w.num_panels - first), n = many * KTK_PANEL;
    float *y = p->y + first * KTK_PANEL;
    p->m->w.gemm(&(ktk_gemm_args){&p->m->w, panels, many, &p->rows, &row, 1, y, n, next,
                                  s->thread_buffers + thread * s->thread_bytes});
    if (p->m->bias) s->kernels->add(y, p->m->bias + first * KTK_PANEL, n);
}

/* Products of x with several matrices. */
static void multiply(step *s, const int *which, int n, float *x) {
    int64_t panels = 0;
    s->num_running = 0;
    for (int j = 0; j < n; j++) {
        product *p = &s->products[which[j]];
        if (!p->m->panels) continue;
        put_token(s->kernels, &p->m->w, &p->rows, 0, x);
        s->running[s->num_running++] = p;
        panels += p->m->w.num_panels;
    }
    if (!s->num_running) return;
    s->panels_of_task = PANELS;
    while (s->panels_of_task > LEAST_PANELS &&
           panels < (int64_t)TASKS_PER_THREAD * s->num_threads * s->panels_of_task)
        s->panels_of_task /= 2;
    for (int j = 0; j < s->num_running; j++) {
        const int64_t tasks = (s->running[j]->m->w.num_panels + s->panels_of_task - 1) / s->panels_of_task;
        s->first_task[j + 1] = s->first_task[j] + tasks;
    }
    const int64_t begin[] = {0, s->first_task[s->num_running]};
    ktk_pool_run(s->pool, product_task, s, begin, 1);
}

static float sum_of_products(const float *a, const float *b, int n) {
    float sums[16] = {0}, sum = 0.0f;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += a[i + j] * b[i + j];
    for (; i < n; i++) sum += a[i] * b[i];
    for (int j = 0; j < 16; j++) sum += sums[j];
    return sum;
}

static void rms_norm(const float *x, int n, float epsilon, const float *weight, float *out) {
    const float scale = 1.0f / sqrtf(sum_of_products(x, x, n) / (float)n + epsilon);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void norm_heads(const ktk_decoder_layer *l, float *x, int num_heads, const float *weight) {
    if (!weight) return;
    if (l->norm_is_whole) {
        rms_norm(x, num_heads * l->head_dim, l->head_epsilon, weight, x);
        return;
    }
    for (int h = 0; h < num_heads; h++, x += l->head_dim)
        rms_norm(x, l->head_dim, l->head_epsilon, weight, x);
}

static void rotate_heads(const ktk_decoder_layer *l, float *x, int num_heads, const float *cosines,
                         const float *sines) {
    const int half = l->rotary_dim / 2, apart = l->is_interleaved ? 1 : half,
              next = l->is_interleaved ? 2 : 1;
    for (int h = 0; h < num_heads; h++, x += l->head_dim)
        for (int i = 0; i < half; i++) {
            float *a = x + i * next, *b = a + apart, first = *a;
            *a = first * cosines[i] - *b * sines[i];
            *b = *b * cosines[i] + first * sines[i];
        }
}

static void attend_task(void *context, int64_t index, int thread) {
    const step *s = context;
    const ktk_decoder_layer *l = s->layer;
    const int64_t h = index / s->num_chunks, first = index % s->num_chunks * KTK_ATTEND_KEYS;
    const int64_t left = s->kv->num_cached + 1 - first, size = dtype_bytes(s->dtype);
    const int count = left < KTK_ATTEND_KEYS ? (int)left : KTK_ATTEND_KEYS;
    const uint8_t *keys = s->kv->keys, *values = s->kv->values;
    s->kernels->attend(s->dtype, l->head_dim, s->group, s->products[Q].y + h * s->group * l->head_dim,
                       keys + (h * s->kv->keys_head_stride + first * l->head_dim) * size,
                       values + (h * s->kv->values_head_stride + first * l->head_dim) * size, count,
                       (float *)(s->thread_buffers + thread * s->thread_bytes),
                       s->partial + index * s->group * l->head_dim, s->most + index * s->group * 2);
}

/* One query head's partial results to its output. */
static void join_chunks(const step *s, int head, float *out) {
    const ktk_decoder_layer *l = s->layer;
    const int64_t first = (int64_t)(head / s->group) * s->num_chunks * s->group + head % s->group;
    float most = l->sinks ? l->sinks[head] : -INFINITY;
    for (int c = 0; c < s->num_chunks; c++) {
        const float own = s->most[2 * (first + c * s->group)];
        most = own > most ? own : most;
    }
    float sum = l->sinks ? expf(l->sinks[head] - most) : 0.0f;
    memset(out, 0, 4 * (size_t)l->head_dim);
    for (int c = 0; c < s->num_chunks; c++) {
        const int64_t at = first + (int64_t)c * s->group;
        const float weight = expf(s->most[2 * at] - most), *partial = s->partial + at * l->head_dim;
        sum += weight * s->most[2 * at + 1];
        for (int i = 0; i < l->head_dim; i++) out[i] += weight * partial[i];
    }
    for (int i = 0; i < l->head_dim; i++) out[i] /= sum;
}

static void attend(step *s, const float *cosines, const float *sines) {
    const ktk_decoder_layer *l = s->layer;
    float *q = s->products[Q].y, *k = s->products[K].y, *v = s->products[V].y;
    norm_heads(l, q, l->num_heads, l->q_norm);
    norm_heads(l, k, l->num_kv_heads, l->k_norm);
    rotate_heads(l, q, l->num_heads, cosines, sines);
    rotate_heads(l, k, l->num_kv_heads, cosines, sines);
    for (int i = 0; i < l->num_heads * l->head_dim; i++) q[i] *= l->scaling;
    const int64_t size = dtype_bytes(s->dtype), row = s->kv->num_cached * l->head_dim;
    for (int h = 0; h < l->num_kv_heads; h++) {
        uint8_t *keys = s->kv->keys, *values = s->kv->values;
        s->kernels->store(s->dtype, k + h * l->head_dim, l->head_dim,
                          keys + (h * s->kv->keys_head_stride + row) * size);
        s->kernels->store(s->dtype, v + h * l->head_dim, l->head_dim,
                          values + (h * s->kv->values_head_stride + row) * size);
    }
    const int64_t begin[] = {0, (int64_t)l->num_kv_heads * s->num_chunks};
    ktk_pool_run(s->pool, attend_task, s, begin, 1);
    for (int h = 0; h < l->num_heads; h++) join_chunks(s, h, s->attended + (int64_t)h * l->head_dim);
}

static void add_mlp(step *s) {
    const ktk_mlp *mlp = s->layer->mlp;
    const int n = mlp->gate.out_features;
    const float *gate = s->products[GATE].y, *up = s->products[UP].y;
    s->kernels->activate(&mlp->activation, gate, up, KTK_PANEL, mlp->gate.w.num_panels, NULL, NULL, s->h);
    memset(s->h + n, 0, 4 * (size_t)(padded(n) - n));
    multiply(s, (const int[]){DOWN}, 1, s->h);
    float *y = s->products[DOWN].y, scale = 1.0f;
    if (mlp->scale) scale = 1.0f / (1.0f + expf(-sum_of_products(s->x, mlp->scale, s->layer->hidden_size)));
    for (int i = 0; i < s->layer->hidden_size; i++) s->residual[i] += scale * y[i];
}

static void lay_out(step *s, arena *a) {
    const ktk_decoder_layer *l = s->layer;
    const int width = l->num_heads * l->head_dim;
    s->residual = take(a, 4 * padded(l->hidden_size));
    s->x = take(a, 4 * padded(l->hidden_size));
    s->attended = take(a, 4 * padded(width));
    s->h = l->mlp ? take(a, 4 * padded(l->mlp->gate.out_features)) : NULL;
    int64_t work = 4 * KTK_ATTEND_WORK((int64_t)s->group, l->head_dim);
    for (int i = 0; i < NUM_MATRICES; i++) {
        product *p = &s->products[i];
        if (!p->m->panels) continue;
        p->rows = take_rows(a, &p->m->w, 1);
        p->y = take(a, 4 * (int64_t)p->m->w.num_panels * KTK_PANEL);
        work = p->m->w.work_bytes > work ? p->m->w.work_bytes : work;
    }
    const int64_t pieces = (int64_t)l->num_heads * s->num_chunks;
    s->partial = take(a, 4 * pieces * l->head_dim);
    s->most = take(a, 8 * pieces);
    s->thread_bytes = round_up(work, 4096) + 64;
    s->thread_buffers = take(a, s->thread_bytes * s->num_threads);
}

/* All but the experts, with the pool locked: residual, the experts' input and the logits are left in kept. */
static int run_dense(step *s, const void *hidden, const float *cosines, const float *sines, float *kept) {
    const ktk_decoder_layer *l = s->layer;
    arena counted = {0};
    lay_out(s, &counted);
    arena a = {ktk_pool_scratch(s->pool, counted.used), 0};
    if (!a.base) return 1;
    lay_out(s, &a);
    const int n = l->hidden_size, width = l->num_heads * l->head_dim;
    memset(s->x + n, 0, 4 * (size_t)(padded(n) - n));
    memset(s->attended + width, 0, 4 * (size_t)(padded(width) - width));
    s->kernels->load(s->dtype, hidden, n, s->residual);
    rms_norm(s->residual, n, l->epsilon, l->input_norm, s->x);
    multiply(s, (const int[]){Q, K, V}, 3, s->x);
    attend(s, cosines, sines);
    multiply(s, (const int[]){O}, 1, s->attended);
    s->kernels->add(s->residual, s->products[O].y, n);
    rms_norm(s->residual, n, l->epsilon, l->output_norm, s->x);
    memcpy(kept + n, s->x, 4 * (size_t)n); /* put_token may change x */
    multiply(s, (const int[]){LOGITS, GATE, UP}, 3, s->x);
    if (l->experts) memcpy(kept + 3 * n, s->products[LOGITS].y, 4 * (size_t)l->router.num_experts);
    if (l->mlp) add_mlp(s);
    memcpy(kept, s->residual, 4 * (size_t)n);
    return 0;
}

int ktk_decoder_layer_forward(const ktk_decoder_layer *l, const ktk_kernels *kernels, ktk_pool *pool,
                              int dtype, const void *hidden, const float *cosines, const float *sines,
                              const ktk_kv_rows *kv, void *out) {
    step s = {.layer = l,
              .kernels = kernels,
              .pool = pool,
              .num_threads = ktk_pool_num_threads(pool),
              .dtype = dtype,
              .group = l->num_heads / l->num_kv_heads,
              .num_chunks = (int)((kv->num_cached + KTK_ATTEND_KEYS) / KTK_ATTEND_KEYS),
              .kv = kv};
    const ktk_dense *const matrices[NUM_MATRICES] = {&l->q,
                                                     &l->k,
                                                     &l->v,
                                                     &l->o,
                                                     &l->logits,
                                                     l->mlp ? &l->mlp->gate : NULL,
                                                     l->mlp ? &l->mlp->up : NULL,
                                                     l->mlp ? &l->mlp->down : NULL};
    static const ktk_dense none;
    for (int i = 0; i < NUM_MATRICES; i++) s.products[i].m = matrices[i] ? matrices[i] : &none;
    const int n = l->hidden_size, experts = l->router.num_experts, top_k = l->router.top_k;
    /* ids; residual, input of the experts, their output, logits, scores, weights */
    const size_t floats = 3 * (size_t)n + 3 * (size_t)experts + (size_t)top_k;
    int64_t *ids = malloc(8 * (size_t)top_k + 4 * floats);
    if (!ids) return 1;
    float *kept = (float *)(ids + top_k), *logits = kept + 3 * n, *weights = logits + 3 * experts;
    const unsigned callers = ktk_float_mode_enter();
    ktk_pool_lock(pool);
    int status = run_dense(&s, hidden, cosines, sines, kept);
    ktk_pool_unlock(pool);
    const float *result = kept;
    if (!status && l->experts) {
        ktk_route(&l->router, logits, logits + experts, ids, weights);
        status = ktk_moe_forward(l->experts, kernels, pool, 1, top_k, KTK_DTYPE_F32, kept + n, ids, weights,
                                 NULL, kept, kept + 2 * n);
        result = kept + 2 * n;
    }
    if (!status) kernels->store(dtype, result, n, out);
    ktk_float_mode_leave(callers);
    free(ids);
    return status;
}
