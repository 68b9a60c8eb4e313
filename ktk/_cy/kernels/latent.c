/* Attention of rows over pages of latents, absorbed: one key and value for all heads, latent_dim
 * wide.
 *
 *   q_a, latent   inputs of the branch; norm of q_a's output, q
 *   a row         norm, rotation; the latent to its page of keys, the keys' rotated part to its
 * page of values absorb        a product a head: queries become latent_dim wide attend scores over
 * latent and rotated part, sums of latents expand        a product a head: sums become values o one
 * run */
#include "component.h"

static int query_dim(const ktk_latent_attention *l) { return l->nope_dim + l->rotary.dim; }
static int key_dim(const ktk_latent_attention *l) { return l->latent_dim + l->rotary.dim; }

static void norm_query(void *context, int64_t row, int thread) {
    const component *c = context;
    const ktk_latent_attention *l = c->part;
    float *x = float_buffer(&c->s->crew, thread);
    ktk_rms_norm(&l->q_norm, (const float *)c->inputs[0].y + row * c->inputs[0].stride, x);
    ktk_put(&c->s->crew, &c->query, 1, row, x);
}

static const product *query_of(const component *c) {
    return ((const ktk_latent_attention *)c->part)->q_a.panels ? &c->query : &c->inputs[0];
}

static void place_row(void *context, int64_t row, int thread) {
    const component *c = context;
    const ktk_latent_attention *l = c->part;
    const step *s = c->s;
    const ktk_sequence *sequence = &s->rows->sequences[s->rows->sequence[row]];
    const product *queries = query_of(c);
    float *x = float_buffer(&s->crew, thread);
    const float *latent = (const float *)c->inputs[1].y + row * c->inputs[1].stride;
    ktk_rms_norm(&l->latent_norm, latent, x);
    ktk_cache_row(s, &sequence->keys, row, 0, x, l->latent_dim);
    ktk_rotate(&l->rotary, s->rows, row, latent + l->latent_dim, x);
    ktk_cache_row(s, &sequence->values, row, 0, x, l->rotary.dim);
    float *q = (float *)queries->y + row * queries->stride;
    for (int i = 0; i < l->num_heads * query_dim(l); i++) q[i] *= l->scaling;
    for (int h = 0; h < l->num_heads; h++, q += query_dim(l)) {
        float *absorbed = c->heads + (row * l->num_heads + h) * key_dim(l);
        ktk_rotate(&l->rotary, s->rows, row, q + l->nope_dim, absorbed + l->latent_dim);
        memcpy(x, q, 4 * (size_t)l->nope_dim);
        ktk_put(&s->crew, &c->absorb[h], 1, row, x);
    }
}

static void join_row(void *context, int64_t row, int thread) {
    const component *c = context;
    const ktk_latent_attention *l = c->part;
    float *x = float_buffer(&c->s->crew, thread);
    for (int h = 0; h < l->num_heads; h++) {
        ktk_join(&c->queries, row, h, x);
        ktk_put(&c->s->crew, &c->expand[h], 1, row, x);
    }
}

static void put_values(void *context, int64_t row, int thread) {
    const component *c = context;
    const ktk_latent_attention *l = c->part;
    const int n = l->num_heads * l->value_dim;
    float *x = float_buffer(&c->s->crew, thread);
    memcpy(x, c->values + (int64_t)row * n, 4 * (size_t)n);
    ktk_put(&c->s->crew, &c->output, 1, row, x);
}

static void run_latent_attention(component *c, float *out) {
    const ktk_latent_attention *l = c->part;
    crew *crew = &c->s->crew;
    const int64_t rows = crew->num_rows;
    if (l->q_a.panels) {
        ktk_each_row(crew, 0, rows, norm_query, c);
        ktk_multiply(crew, &c->query, 1);
    }
    ktk_each_row(crew, 0, rows, place_row, c);
    ktk_multiply(crew, c->absorb, l->num_heads);
    ktk_attend_rows(&c->queries, join_row, c);
    ktk_multiply(crew, c->expand, l->num_heads);
    ktk_each_row(crew, 0, rows, put_values, c);
    ktk_multiply(crew, &c->output, 1);
    ktk_add_rows(c->s, &c->output, out);
}

/* A matrix of all heads' outputs as a product a head, of rows and into y of its own: y (rows,
 * heads, step floats). */
static product *products_of_heads(component *c, arena *a, const ktk_dense *m, float *y, int step) {
    crew *crew = &c->s->crew;
    const int heads = ((const ktk_latent_attention *)c->part)->num_heads,
              panels = m->w.num_panels / heads;
    product *products = take(a, (int64_t)sizeof(product) * heads);
    product of_all = ktk_lay_out_product_into(crew, a, m, heads * crew->num_rows, KTK_DTYPE_F32,
                                              NULL, (int64_t)heads * step);
    for (int h = 0; a->base && h < heads; h++) {
        product *p = &products[h];
        const int64_t first = h * crew->num_rows;
        *p = of_all;
        p->panels += (int64_t)h * panels * m->w.panel_bytes;
        p->num_panels = panels;
        p->columns = panels * KTK_PANEL;
        p->y = y + (int64_t)h * step;
        p->rows.codes += first * p->rows.code_stride;
        p->rows.scales += p->rows.scales ? first * p->rows.scale_stride : 0;
        p->rows.correction += p->rows.correction ? first * p->rows.correction_stride : 0;
    }
    return products;
}

void ktk_lay_out_latent_attention(component *c, arena *a) {
    const ktk_latent_attention *l = c->part;
    crew *crew = &c->s->crew;
    c->run = run_latent_attention;
    ktk_add_input(c->s, a, l->q_a.panels ? &l->q_a : &l->q);
    ktk_add_input(c->s, a, &l->latent);
    if (l->q_a.panels) c->query = ktk_lay_out_product(crew, a, &l->q, NULL);
    c->heads = take(a, 4 * crew->num_rows * l->num_heads * key_dim(l));
    c->values = take(a, 4 * crew->num_rows * l->num_heads * l->value_dim);
    c->absorb = products_of_heads(c, a, &l->absorb, c->heads, key_dim(l));
    c->expand = products_of_heads(c, a, &l->expand, c->values, l->value_dim);
    ktk_want_floats(crew, key_dim(l));
    c->queries = (queries){.num_kv_heads = 1,
                           .group = l->num_heads,
                           .key_dim = l->latent_dim,
                           .more_dim = l->rotary.dim,
                           .value_dim = l->latent_dim,
                           .q = c->heads,
                           .q_stride = (int64_t)l->num_heads * key_dim(l)};
    ktk_lay_out_queries(&c->queries, c->s, a);
    c->output = ktk_lay_out_product(crew, a, &l->o, NULL);
}
