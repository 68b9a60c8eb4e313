/* Routing of one token: which experts, with which weights. */
#include <math.h>
#include <stddef.h>

#include "ktk_decoder.h"

static void score_experts(const ktk_router *r, const float *logits, float *scores) {
    if (r->score == KTK_SIGMOID) {
        for (int e = 0; e < r->num_experts; e++) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
        return;
    }
    float most = logits[0], sum = 0.0f;
    for (int e = 1; e < r->num_experts; e++) most = logits[e] > most ? logits[e] : most;
    for (int e = 0; e < r->num_experts; e++) sum += scores[e] = expf(logits[e] - most);
    for (int e = 0; e < r->num_experts; e++) scores[e] /= sum;
}

/* Index of the largest of n, the first of equals; NaN is never larger. */
static int largest(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best] || (x[best] != x[best] && x[i] == x[i])) best = i;
    return best;
}

static float sum_of_best(const float *x, int n, int many) {
    float sum = 0.0f, below = INFINITY;
    int from = -1; /* the last one counted: equals come in order */
    for (int j = 0; j < many && j < n; j++) {
        int best = -1;
        for (int i = 0; i < n; i++) {
            const int is_left = x[i] < below || (x[i] == below && i > from);
            if (is_left && (best < 0 || x[i] > x[best])) best = i;
        }
        if (best < 0) break;
        sum += below = x[best];
        from = best;
    }
    return sum;
}

/* Experts of all groups but the best are taken out of the choice. */
static void choose_groups(const ktk_router *r, float *choice) {
    const int size = r->num_experts / r->num_groups;
    float best_of[KTK_MAX_GROUPS];
    for (int g = 0; g < r->num_groups; g++)
        best_of[g] = sum_of_best(choice + g * size, size, r->best_of_group);
    uint8_t is_chosen[KTK_MAX_GROUPS] = {0};
    for (int j = 0; j < r->top_groups; j++) {
        const int g = largest(best_of, r->num_groups);
        is_chosen[g] = 1;
        best_of[g] = -INFINITY;
    }
    for (int g = 0; g < r->num_groups; g++)
        for (int e = 0; !is_chosen[g] && e < size; e++) choice[g * size + e] = -INFINITY;
}

void ktk_route(const ktk_router *r, const float *logits, float *scores, int64_t *ids,
               float *weights) {
    float *choice = scores + r->num_experts, sum = 0.0f;
    score_experts(r, logits, scores);
    for (int e = 0; e < r->num_experts; e++)
        choice[e] = scores[e] + (r->correction ? r->correction[e] : 0.0f);
    if (r->top_groups < r->num_groups) choose_groups(r, choice);
    for (int j = 0; j < r->top_k; j++) {
        const int e = largest(choice, r->num_experts);
        choice[e] = -INFINITY;
        ids[j] = e;
        weights[j] = scores[e];
        sum += scores[e];
    }
    const float scale = r->is_normalised ? r->scale / sum : r->scale;
    for (int j = 0; j < r->top_k; j++) weights[j] *= scale;
}
