/* Components of a decoder layer at work: each says what scratch its rows need (lay_out) and
 * computes them (run). */
#ifndef KTK_COMPONENT_H
#define KTK_COMPONENT_H

#include "products.h"

enum { MAX_INPUTS = 4 * KTK_MAX_COMPONENTS };

/* A call of ktk_decoder_layer_forward, and the branch that is being run. */
typedef struct {
    crew crew;
    const ktk_decoder_rows *rows;
    int dtype, hidden_size, status; /* status: what the experts' operator said */
    float *residual, *x,
        /* (rows, hidden_size): x the branch's input, sum where its output is not the residual's */
        *sum;
    product inputs[MAX_INPUTS]; /* of x, all in one run */
    int num_inputs;
    const ktk_foresight *foresight; /* that is used in this call, or NULL */
} step;

/* Rows of one sequence that follow each other: they look at the same keys together. */
typedef struct {
    int64_t first, first_task;
    int32_t count; /* rows */
    int32_t num_chunks;
    int64_t first_chunk;
} row_block;

/* Query heads over cached tokens: chunks of KTK_ATTEND_KEYS tokens at fixed places, joined in
 * order. */
typedef struct {
    step *s;
    int num_kv_heads, group, window;
    int key_dim, more_dim,
        /* more_dim: keys go on in the pages of values, and are the values themselves */
        value_dim;
    /* q (rows, heads, key_dim + more_dim) with q_stride between rows, scaled */
    const float *q, *sinks;
    int64_t q_stride;
    int64_t *first_partial; /* (rows + 1): of a row's results, one a head block and chunk */
    row_block *blocks;      /* of the rows whose tasks run; (rows,) */
    int num_blocks;
    float *partial, *most;
} queries;

void ktk_lay_out_queries(queries *q, step *s, arena *a);
/* fn(context, row, thread) once a row's chunks are there: it joins them. */
void ktk_attend_rows(queries *q, ktk_task_fn *fn, void *context);
void ktk_join(const queries *q, int64_t row, int head, float *out); /* out (value_dim) */

typedef struct component component;
struct component {
    void (*run)(component *c,
                float *out); /* adds to out (rows, hidden_size), once the inputs are multiplied */
    step *s;
    const void *part;
    const product *inputs;    /* its own among the step's */
    product output;           /* the last matrix */
    queries queries;          /* of attention */
    product query;            /* of latent attention: of q_a's output */
    product *absorb, *expand; /* one a head */
    float *heads, *values;    /* (rows, heads, latent_dim + rotary), (rows, heads, value_dim) */
    int64_t *ids, *foretold;  /* of routing: (rows, top_k), as weights */
    float *weights;
    void *scratch; /* of the experts */
    float *out;
};

/* What each lays out sets run. */
typedef void lay_out_fn(component *c, arena *a);
lay_out_fn ktk_lay_out_attention, ktk_lay_out_latent_attention;

/* One more product of x. */
void ktk_add_input(step *s, arena *a, const ktk_dense *m);
/* out += the product's rows. */
void ktk_add_rows(step *s, const product *p, float *out);

float ktk_dot(const float *a, const float *b, int n);
void ktk_rms_norm(const ktk_norm *norm, const float *x, float *out);
/* x and out may be the same, unless the order changes. */
void ktk_rotate(const ktk_rotary *r, const ktk_decoder_rows *rows, int64_t row, const float *x,
                float *out);
/* A row of n fp32, a multiple of 16, to its place in the pages of its sequence. */
void ktk_cache_row(const step *s, const ktk_paged *pages, int64_t row, int head, const float *x,
                   int n);

#endif
