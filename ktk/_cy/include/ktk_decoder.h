/* One new token through a decoder layer (see decoder.c), and its routing (routing.c). */
#ifndef KTK_DECODER_H
#define KTK_DECODER_H

#include "ktk.h"

/* A dense matrix as ktk_linear_forward takes it. panels NULL: there is none. */
typedef struct {
    ktk_matrix w;
    const uint8_t *panels;
    const float *bias; /* (16 * w.num_panels) or NULL */
    int32_t in_features, out_features;
} ktk_dense;

enum ktk_score { KTK_SOFTMAX, KTK_SIGMOID };
enum { KTK_MAX_GROUPS = 256 };

/* How logits choose experts: scores, plus the correction for the choice alone; of num_groups equal groups the top_groups with
 * the largest sum of their best_of_group best; of their experts the top_k best. Weights: scores, over their
 * sum if is_normalised, times scale. */
typedef struct {
    int32_t num_experts, top_k, score, num_groups, top_groups, best_of_group, is_normalised;
    float scale;
    const float *correction; /* (num_experts) or NULL */
} ktk_router;

/* logits (num_experts) -> ids, weights (top_k), best first. scores: 2 * num_experts floats of work. */
void ktk_route(const ktk_router *router, const float *logits, float *scores, int64_t *ids, float *weights);

/* down(act(gate(x)) * up(x)), times sigmoid(x . scale) if there is a scale. */
typedef struct {
    ktk_dense gate, up, down;
    ktk_activation activation;
    const float *scale; /* (hidden_size) or NULL */
} ktk_mlp;

typedef struct {
    int32_t hidden_size, num_heads, num_kv_heads, head_dim; /* head_dim: a multiple of 16 */
    int32_t rotary_dim;                                     /* the first of a head's; even */
    int32_t is_interleaved; /* rotated pairs are neighbours, not half of rotary_dim apart */
    int32_t norm_is_whole;  /* of q and k: over all heads, not each */
    float epsilon, head_epsilon, scaling;
    const float *input_norm, *output_norm; /* (hidden_size): before attention, before the experts */
    const float *q_norm, *k_norm;          /* (head_dim), whole: (heads * head_dim); or NULL */
    const float *sinks;                    /* (num_heads) or NULL */
    ktk_dense q, k, v, o;
    const ktk_layer *experts; /* NULL: the MLP is all */
    ktk_dense logits;
    ktk_router router;
    const ktk_mlp *mlp; /* dense or shared experts, or NULL */
} ktk_decoder_layer;

/* Keys and values of one sequence: row r of head h at (h * head_stride + r * head_dim) elements. The new token's are
 * written to row num_cached, and rows [0, num_cached] are attended to. */
typedef struct {
    void *keys, *values;
    int64_t keys_head_stride, values_head_stride, num_cached;
} ktk_kv_rows;

/* hidden, out (hidden_size) of dtype, as are the cached rows; cos, sin float (rotary_dim / 2). 0, or 1 when memory cannot be
 * had. */
int ktk_decoder_layer_forward(const ktk_decoder_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                              int dtype, const void *hidden, const float *cos, const float *sin,
                              const ktk_kv_rows *kv, void *out);

#endif
