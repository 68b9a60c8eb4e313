/* Rows through a decoder layer: branches of a residual stream, each a norm, components that read
 * it, and what becomes of their sum.
 *
 *   a row     residual, norm                  -> x, quantised for the inputs of all components
 *   inputs    what is multiplied by x, in one run of the pool (q, k, v; gate, up, logits)
 *   components, in order: attention.c, latent.c, the MLP and routed experts
 *   a row     output norm, multiplier; where there is neither the components have added to the
 * residual itself
 *
 * With one row the caller works alone between runs: some microseconds. All in fp32; only what is
 * cached and given back has other dtypes. */
#include <math.h>

#include "component.h"
#include "moe.h"

float ktk_dot(const float *a, const float *b, int n) {
    float sums[16] = {0}, sum = 0.0f;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += a[i + j] * b[i + j];
    for (; i < n; i++) sum += a[i] * b[i];
    for (int j = 0; j < 16; j++) sum += sums[j];
    return sum;
}

void ktk_rms_norm(const ktk_norm *norm, const float *x, float *out) {
    const int n = norm->size;
    const float scale = 1.0f / sqrtf(ktk_dot(x, x, n) / (float)n + norm->epsilon);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * norm->weight[i];
}

void ktk_rotate(const ktk_rotary *r, const ktk_decoder_rows *rows, int64_t row, const float *x,
                float *out) {
    const int half = r->dim / 2, is_apart = r->order == KTK_ROTARY_HALVES,
              ends_apart = r->order != KTK_ROTARY_PAIRS;
    const float *cosines = rows->cosines + row * half, *sines = rows->sines + row * half;
    const int next = is_apart ? 1 : 2, apart = is_apart ? half : 1, next_out = ends_apart ? 1 : 2,
              apart_out = ends_apart ? half : 1;
    for (int i = 0; i < half; i++) {
        const float a = x[i * next], b = x[i * next + apart];
        out[i * next_out] = a * cosines[i] - b * sines[i];
        out[i * next_out + apart_out] = b * cosines[i] + a * sines[i];
    }
}

void ktk_add_input(step *s, arena *a, const ktk_dense *m) {
    s->inputs[s->num_inputs] =
        ktk_lay_out_product(&s->crew, a, m, s->num_inputs ? s->inputs : NULL);
    s->num_inputs++;
}

void ktk_add_rows(step *s, const product *p, float *out) {
    for (int64_t row = 0; row < s->crew.num_rows; row++)
        s->crew.kernels->add(out + row * s->hidden_size, (const float *)p->y + row * p->stride,
                             s->hidden_size);
}

/* --- MLP
 * ------------------------------------------------------------------------------------------ */

static void activate_row(void *context, int64_t row, int thread) {
    const component *c = context;
    const ktk_mlp *mlp = c->part;
    const product *gate = &c->inputs[0], *up = &c->inputs[1];
    float *h = float_buffer(&c->s->crew, thread);
    c->s->crew.kernels->activate(&mlp->activation, (const float *)gate->y + row * gate->stride,
                                 (const float *)up->y + row * up->stride, KTK_PANEL,
                                 gate->num_panels, NULL, NULL, h);
    ktk_put(&c->s->crew, &c->output, 1, row, h);
}

static void run_mlp(component *c, float *out) {
    const ktk_mlp *mlp = c->part;
    const int n = c->s->hidden_size;
    ktk_each_row(&c->s->crew, 0, c->s->crew.num_rows, activate_row, c);
    ktk_multiply(&c->s->crew, &c->output, 1);
    for (int64_t row = 0; row < c->s->crew.num_rows; row++) {
        const float *y = (const float *)c->output.y + row * c->output.stride;
        float scale = 1.0f, *sum = out + row * n;
        if (mlp->scale) scale = 1.0f / (1.0f + expf(-ktk_dot(c->s->x + row * n, mlp->scale, n)));
        for (int i = 0; i < n; i++) sum[i] += scale * y[i];
    }
}

static void lay_out_mlp(component *c, arena *a) {
    const ktk_mlp *mlp = c->part;
    c->run = run_mlp;
    ktk_add_input(c->s, a, &mlp->gate);
    ktk_add_input(c->s, a, &mlp->up);
    c->output = ktk_lay_out_product(&c->s->crew, a, &mlp->down, NULL);
    ktk_want_floats(&c->s->crew, mlp->gate.w.num_panels * KTK_PANEL);
}

/* --- routed experts
 * ------------------------------------------------------------------------------- */

static void route_row(void *context, int64_t row, int thread) {
    const component *c = context;
    const ktk_routed *l = c->part;
    const int64_t first = row * l->router.top_k;
    ktk_route(&l->router, (const float *)c->inputs[0].y + row * c->inputs[0].stride,
              float_buffer(&c->s->crew, thread), c->ids + first, c->weights + first);
}

/* The next layer's experts that are elsewhere, of those the rows may be routed to; their number. */
static int64_t foretell(component *c) {
    const ktk_foresight *next = c->s->foresight;
    const product *logits = &c->inputs[1];
    const int top_k = next->router.top_k;
    float *work = float_buffer(&c->s->crew, 0);
    float *weights = work + 2 * next->router.num_experts;
    int64_t found = 0;
    ktk_lock_to_read(next->experts);
    for (int64_t row = 0; row < c->s->crew.num_rows; row++) {
        int64_t *ids = c->foretold + found; /* what is kept is never more than rows before */
        ktk_route(&next->router, (const float *)logits->y + row * logits->stride, work, ids,
                  weights);
        for (int i = 0; i < top_k; i++)
            if (ktk_is_absent(next->experts, ids[i])) c->foretold[found++] = ids[i];
    }
    ktk_unlock(next->experts);
    return found;
}

static int bring(component *c) {
    const ktk_routed *l = c->part;
    const ktk_decoder_rows *rows = c->s->rows;
    const int64_t num_ids = c->s->crew.num_rows * l->router.top_k;
    const int64_t num_foretold = c->foretold ? foretell(c) : 0;
    if (l->arrivals && rows->held &&
        ktk_arrivals_bring(l->arrivals, l->number, num_ids, c->ids, num_foretold, c->foretold,
                           rows->held))
        return KTK_DONE;
    return rows->bring(rows->caller, l->owner, num_ids, c->ids, c->weights, num_foretold,
                       c->foretold);
}

static void run_routed(component *c, float *out) {
    const ktk_routed *l = c->part;
    const crew *crew = &c->s->crew;
    ktk_each_row(&c->s->crew, 0, crew->num_rows, route_row, c);
    const ktk_decoder_rows *rows = c->s->rows;
    if (rows->chosen) memcpy(rows->chosen, c->ids, 8 * (size_t)(crew->num_rows * l->router.top_k));
    if (l->owner) c->s->status = bring(c);
    if (c->s->status) return;
    c->s->status = ktk_moe_run(l->experts, crew->kernels, crew->pool, crew->num_rows,
                               l->router.top_k, KTK_DTYPE_F32, c->s->x, c->ids, c->weights, NULL,
                               l->lora, out, out, c->scratch);
}

static void lay_out_routed(component *c, arena *a) {
    const ktk_routed *l = c->part;
    const crew *crew = &c->s->crew;
    const int64_t pairs = crew->num_rows * l->router.top_k;
    c->run = run_routed;
    ktk_add_input(c->s, a, &l->logits);
    ktk_want_floats(&c->s->crew, 2 * l->router.num_experts);
    if (c->s->foresight && c->s->foresight == l->foresight) {
        const ktk_router *next = &l->foresight->router;
        ktk_add_input(c->s, a, &l->foresight->logits);
        ktk_want_floats(&c->s->crew, 2 * next->num_experts + next->top_k);
        c->foretold = take(a, 8 * crew->num_rows * next->top_k);
    }
    c->ids = take(a, 8 * pairs);
    c->weights = take(a, 4 * pairs);
    c->scratch = take(a, ktk_moe_scratch_bytes(l->experts, crew->kernels, crew->num_threads,
                                               crew->num_rows, l->router.top_k, l->lora));
}

/* --- the layer
 * ------------------------------------------------------------------------------------ */

static lay_out_fn *const LAY_OUT[] = {[KTK_ATTENTION] = ktk_lay_out_attention,
                                      [KTK_LATENT_ATTENTION] = ktk_lay_out_latent_attention,
                                      [KTK_MLP] = lay_out_mlp,
                                      [KTK_ROUTED] = lay_out_routed};

static void lay_out_branch(step *s, const ktk_branch *b, component *components, arena *a) {
    s->num_inputs = 0;
    for (int i = 0; i < b->num_components; i++) {
        components[i] =
            (component){.s = s, .part = b->components[i].part, .inputs = &s->inputs[s->num_inputs]};
        LAY_OUT[b->components[i].kind](&components[i], a);
    }
}

typedef struct {
    step *s;
    const ktk_branch *branch;
} branch_row;

static void begin_row(void *context, int64_t row, int thread) {
    const branch_row *b = context;
    const step *s = b->s;
    const float *residual = s->residual + row * s->hidden_size;
    float *x = float_buffer(&s->crew, thread), *kept = s->x + row * s->hidden_size;
    if (b->branch->norm.weight)
        ktk_rms_norm(&b->branch->norm, residual, x);
    else
        memcpy(x, residual, 4 * (size_t)s->hidden_size);
    memcpy(kept, x, 4 * (size_t)s->hidden_size);
    ktk_put(&s->crew, s->inputs, s->num_inputs, row, x);
}

static void end_row(void *context, int64_t row, int thread) {
    (void)thread;
    const branch_row *b = context;
    const step *s = b->s;
    float *sum = s->sum + row * s->hidden_size, *residual = s->residual + row * s->hidden_size;
    if (b->branch->output_norm.weight) ktk_rms_norm(&b->branch->output_norm, sum, sum);
    for (int i = 0; i < s->hidden_size; i++) residual[i] += b->branch->multiplier * sum[i];
}

static void run_branch(step *s, const ktk_branch *branch, arena a) {
    component components[KTK_MAX_COMPONENTS];
    lay_out_branch(s, branch, components, &a);
    branch_row context = {s, branch};
    ktk_each_row(&s->crew, 0, s->crew.num_rows, begin_row, &context);
    ktk_multiply(&s->crew, s->inputs, s->num_inputs);
    const int is_plain = !branch->output_norm.weight && branch->multiplier == 1.0f;
    float *out = is_plain ? s->residual : s->sum;
    if (!is_plain) memset(out, 0, 4 * (size_t)(s->crew.num_rows * s->hidden_size));
    for (int i = 0; i < branch->num_components && !s->status; i++)
        components[i].run(&components[i], out);
    if (!is_plain) ktk_each_row(&s->crew, 0, s->crew.num_rows, end_row, &context);
}

/* What is there for all branches; the branch's own follows. */
static void lay_out_layer(step *s, arena *a) {
    const int64_t bytes = 4 * s->crew.num_rows * s->hidden_size;
    s->residual = take(a, bytes);
    s->x = take(a, bytes);
    s->sum = take(a, bytes);
    ktk_lay_out_crew(&s->crew, a);
}

static int64_t most_branch_bytes(step *s, const ktk_decoder_layer *layer) {
    int64_t most = 0;
    for (int i = 0; i < layer->num_branches; i++) {
        component components[KTK_MAX_COMPONENTS];
        arena counted = {0};
        lay_out_branch(s, &layer->branches[i], components, &counted);
        most = counted.used > most ? counted.used : most;
    }
    return most;
}

/* Looked at once a call, as it changes what is laid out. */
static const ktk_foresight *foresight_of(const ktk_decoder_layer *layer) {
    for (int i = 0; i < layer->num_branches; i++)
        for (int j = 0; j < layer->branches[i].num_components; j++) {
            const ktk_component *c = &layer->branches[i].components[j];
            const ktk_foresight *f =
                c->kind == KTK_ROUTED ? ((const ktk_routed *)c->part)->foresight : NULL;
            if (f && f->is_on && f->experts->num_absent) return f;
        }
    return NULL;
}

int ktk_decoder_layer_forward(const ktk_decoder_layer *layer, const ktk_kernels *kernels,
                              ktk_pool *pool, int dtype, const void *hidden,
                              const ktk_decoder_rows *rows, void *out) {
    step s = {.rows = rows,
              .dtype = dtype,
              .hidden_size = layer->hidden_size,
              .foresight = foresight_of(layer)};
    s.crew = (crew){.kernels = kernels,
                    .pool = pool,
                    .num_threads = ktk_pool_num_threads(pool),
                    .num_rows = rows->num_rows};
    const int64_t floats = (int64_t)rows->num_rows * layer->hidden_size;
    const unsigned callers = ktk_float_mode_enter();
    ktk_pool_lock(pool);
    ktk_want_floats(&s.crew, layer->hidden_size);
    const int64_t branch_bytes = most_branch_bytes(&s, layer);
    arena a = {0};
    lay_out_layer(&s, &a);
    a = (arena){ktk_pool_scratch(pool, a.used + branch_bytes), 0};
    if (a.base) {
        lay_out_layer(&s, &a);
        kernels->load(dtype, hidden, floats, s.residual);
        for (int i = 0; i < layer->num_branches && !s.status; i++)
            run_branch(&s, &layer->branches[i], a);
        kernels->store(dtype, s.residual, floats, out);
    }
    ktk_pool_unlock(pool);
    ktk_float_mode_leave(callers);
    return a.base ? s.status : KTK_NO_MEMORY;
}
