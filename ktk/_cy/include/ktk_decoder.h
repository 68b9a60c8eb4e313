/* A decoder layer as components over rows (decoder.c, attention.c, latent.c, routing.c). */
#ifndef KTK_DECODER_H
#define KTK_DECODER_H

#include "ktk_arrivals.h"

/* Keys and values of one sequence in one layer: token t of head h is at
 * pages[t / page_tokens] + h * head_stride + t % page_tokens * row_stride, in elements of dtype.
 * page_tokens: a multiple of KTK_ATTEND_TILE, or no fewer than there are tokens. */
typedef struct {
    void *const *pages;
    int64_t head_stride, row_stride;
} ktk_paged;

typedef struct {
    ktk_paged keys, values; /* of latent attention: latents, and the keys' rotated part */
    int64_t page_tokens;
    int32_t dtype;
} ktk_sequence;

/* Puts experts that rows were routed to where the layer's tables say, until the call is over.
 * caller : the rows' own. owner : the experts' own. ids, weights (num_ids). foretold : experts of
 * the next layer that are elsewhere and that the rows may be routed to. A ktk_status. */
typedef int ktk_bring(void *caller, void *owner, int64_t num_ids, const int64_t *ids,
                      const float *weights, int64_t num_foretold, const int64_t *foretold);

/* What a call gives new tokens, a row each. A row's key and value are written at its position among
 * its sequence's tokens, and it attends to those up to it; no two rows of a call have the same. */
typedef struct {
    int32_t num_rows;
    const ktk_sequence *sequences;
    const int32_t *sequence;      /* (num_rows): an index of sequences */
    const int64_t *position;      /* (num_rows) */
    const float *cosines, *sines; /* (num_rows, dim of the rotary / 2) */
    int64_t *chosen;  /* (num_rows, top_k), where routed rows leave their ids, or NULL */
    ktk_bring *bring; /* for experts with an owner; it runs while the pool is locked */
    void *caller;
    ktk_held *held; /* what ktk_arrivals_bring brought, which is tried first; NULL: it is not */
} ktk_decoder_rows;

/* x / sqrt(mean(x^2) + epsilon) * weight. weight NULL: there is no norm. */
typedef struct {
    const float *weight; /* (size) */
    int32_t size;
    float epsilon;
} ktk_norm;

/* Pairs of a head that turn together: half of dim apart, or neighbours; or neighbours that are put
 * half of dim apart. */
enum ktk_rotary_order { KTK_ROTARY_HALVES, KTK_ROTARY_PAIRS, KTK_ROTARY_PAIRS_TO_HALVES };
typedef struct {
    int32_t dim, order; /* dim: even, those that turn */
} ktk_rotary;

/* Attention of groups of query heads. */
typedef struct {
    int32_t num_heads, num_kv_heads, head_dim; /* head_dim: a multiple of 16 */
    /* the last tokens that are seen, its own included; 0: all */
    int32_t window;
    float scaling;           /* of scores */
    ktk_rotary rotary;       /* of the first of a head */
    ktk_norm q_norm, k_norm; /* of size head_dim: of each head, else of all */
    const float *sinks;      /* (num_heads): a score without a value; or NULL */
    ktk_dense q, k, v, o;
} ktk_attention;

/* Attention over latents (DeepSeek V2, V3), absorbed: what makes keys of latents is applied to
 * queries, what makes values to the sum, so that latents are read as they are. Dims are multiples
 * of 16. */
typedef struct {
    /* a head's query: nope_dim, then rotary.dim */
    int32_t num_heads, nope_dim, latent_dim, value_dim;
    float scaling;
    ktk_rotary rotary;
    ktk_dense q_a; /* or none */
    ktk_norm q_norm;
    ktk_dense q, latent; /* q: of q_a's output, normed; latent: to latent_dim, then rotary.dim */
    ktk_norm latent_norm;
    ktk_dense absorb; /* nope_dim -> latent_dim, one head's outputs behind the other's */
    ktk_dense expand; /* latent_dim -> value_dim, likewise */
    ktk_dense o;
} ktk_latent_attention;

/* down(act(gate(x)) * up(x)), times sigmoid(x . scale) if there is a scale. */
typedef struct {
    ktk_dense gate, up, down;
    ktk_activation activation;
    const float *scale; /* (hidden_size) or NULL */
} ktk_mlp;

enum ktk_score { KTK_SOFTMAX, KTK_SIGMOID };
enum { KTK_MAX_GROUPS = 256 };

/* How logits choose experts: scores, plus the correction for the choice alone; of num_groups equal
 * groups the top_groups with the largest sum of their best_of_group best; of their experts the
 * top_k best. Weights: scores, over their sum if is_normalised, times scale. */
typedef struct {
    int32_t num_experts, top_k, score, num_groups, top_groups, best_of_group, is_normalised;
    float scale;
    const float *correction; /* (num_experts) or NULL */
} ktk_router;

/* logits (num_experts) -> ids, weights (top_k), best first. scores: 2 * num_experts floats of work.
 */
void ktk_route(const ktk_router *router, const float *logits, float *scores, int64_t *ids,
               float *weights);

/* The router of the next layer, which foretells its choice from this one's input. */
typedef struct {
    int32_t is_on;
    ktk_dense logits;
    ktk_router router;
    const ktk_layer *experts;
} ktk_foresight;

typedef struct {
    ktk_dense logits;
    ktk_router router;
    const ktk_layer *experts;
    const ktk_lora *lora;   /* NULL: no adapters */
    void *owner;            /* of experts that come and go, NULL: they stay */
    ktk_arrivals *arrivals; /* with an owner, or NULL; number: of the layer there */
    int32_t number;
    const ktk_foresight *foresight; /* with an owner; or NULL */
} ktk_routed;

enum ktk_component_kind { KTK_ATTENTION, KTK_LATENT_ATTENTION, KTK_MLP, KTK_ROUTED };
typedef struct {
    int32_t kind;
    const void *part; /* the kind's struct */
} ktk_component;

/* residual += multiplier * output_norm(sum of what the components make of norm(residual)), added in
 * their order. */
enum { KTK_MAX_COMPONENTS = 3 };
typedef struct {
    ktk_norm norm, output_norm;
    float multiplier;
    int32_t num_components;
    ktk_component components[KTK_MAX_COMPONENTS];
} ktk_branch;

/* Branches of one residual stream, one after the other. */
typedef struct {
    int32_t hidden_size, num_branches;
    const ktk_branch *branches;
} ktk_decoder_layer;

/* hidden, out (num_rows, hidden_size) of dtype. A row has the same bits
 * whatever other rows, pages and threads there are. A ktk_status. */
int ktk_decoder_layer_forward(const ktk_decoder_layer *layer, const ktk_kernels *kernels,
                              ktk_pool *pool, int dtype, const void *hidden,
                              const ktk_decoder_rows *rows, void *out);

#endif
