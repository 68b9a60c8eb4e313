/* The C side of ktk: shapes of a layer, the operator and the thread pool. Plain C11, no Python.h.
 */
#ifndef KTK_H
#define KTK_H

#include "ktk_kernels.h"

enum { KTK_MAX_PARTS = 16 }; /* NUMA parts of a layer */

#if defined(__x86_64__)
#define KTK_PAUSE() __builtin_ia32_pause()
#else
#define KTK_PAUSE() ((void)0)
#endif

/* A part of every expert: some panels of gate|up and of down, and all biases. One part: the expert
 * as it is. The tables hold a pointer for each expert, NULL for one that is elsewhere. up: NULL
 * where the panels of gate and up alternate behind gate_up (or there is no gate). Biases: NULL
 * without. */
typedef struct {
    const uint8_t *const *gate_up, *const *up, *const *down;
    const float *const *gate_bias, *const *up_bias, *const *down_bias; /* whole, padded to panels */
    int32_t first_up_panel, num_up_panels, first_down_panel, num_down_panels;
} ktk_part;

typedef struct {
    int32_t num_experts, hidden_size, intermediate_size;
    ktk_matrix gate_up, up, down; /* num_panels: of all parts; up: where it is apart */
    ktk_activation activation;
    int32_t num_parts;
    ktk_part parts[KTK_MAX_PARTS];
    _Atomic int64_t num_absent; /* pointers of the tables that are NULL */
    struct ktk_lock *lock;      /* of the tables: operators read, ktk_set_address writes */
} ktk_layer;

struct ktk_lock *ktk_lock_new(int num_experts); /* NULL: no memory */
void ktk_lock_free(struct ktk_lock *lock);

/* What an operator says: done; scratch memory cannot be had; a token goes to an expert that is
 * elsewhere, and nothing was computed; experts cannot be brought while the pool is locked; an
 * expert was awaited in vain, and the output is to be forgotten. */
enum ktk_status { KTK_DONE, KTK_NO_MEMORY, KTK_ABSENT, KTK_NOT_BROUGHT, KTK_AWAITED_IN_VAIN };

/* Whether an expert's bytes are where the tables say: they are; they are being read, and an
 * operator runs the others first and then waits for them; they could not be read. */
enum ktk_arrival { KTK_HERE, KTK_COMING, KTK_LOST };
void ktk_set_arrival(ktk_layer *layer, int64_t expert, int arrival); /* waits for nobody */

/* An entry of the layer's tables; waits until no operator reads them. address NULL: the expert is
 * elsewhere. */
void ktk_set_address(ktk_layer *layer, const void **entry, const void *address);
/* The same for an expert that no operator runs, and none will until this is over. */
void ktk_put_address(ktk_layer *layer, const void **entry, const void *address);

/* The levels of this build, slowest first (ktk/_cy/isa.py); NULL past the last. */
const ktk_kernels *ktk_kernels_row(int index);

/* Thread pool: the caller and num_threads - 1 workers run fn(context, task, thread). The threads
 * are split evenly over num_parts; task lists [begin[i], begin[i + 1]) belong to part i, whose
 * threads take from them first, in order. num_threads >= num_parts. cores: num_threads masks of the
 * CPUs that each may run on, or NULL; the caller's is left free. Workers spin for a moment after a
 * run, then sleep. The pool also owns the operator's scratch memory. */
typedef struct ktk_pool ktk_pool;
typedef void ktk_task_fn(void *context, int64_t task, int thread);
/* may_borrow: see ktk_pool_borrow. NULL: no memory or no threads. */
ktk_pool *ktk_pool_new(int num_threads, int num_parts, const void *cores, int may_borrow);
void ktk_pool_run(ktk_pool *pool, ktk_task_fn *fn, void *context, const int64_t *begin,
                  int num_lists);
int ktk_pool_num_threads(const ktk_pool *pool);
void ktk_pool_lock(ktk_pool *pool); /* one operator at a time */
void ktk_pool_unlock(ktk_pool *pool);
void *ktk_pool_scratch(ktk_pool *pool, int64_t size); /* while locked; NULL: no memory */
void ktk_pool_free(ktk_pool *pool);
/* IEEE rounding and denormals on this thread; gives and takes back the mode the caller had. */
unsigned ktk_float_mode_enter(void);
void ktk_float_mode_leave(unsigned callers);
/* From now on runs use the threads of the OpenMP runtime whose GOMP_parallel this is (until a fork;
 * NULL: no more) ... */
void ktk_pool_borrow(void *gomp_parallel);
/* ... but not those that the calling thread starts. */
int ktk_pool_own_threads_only(int is_only);

/* Fill in what callers need to know of a matrix's kernel: format to panel_bytes are set. */
void ktk_use_kernels(ktk_matrix *m, const ktk_kernels *kernels);

/* The operator (see moe.c). Returns a ktk_status.
 * hidden, out (num_tokens, hidden_size) of dtype; ids, weights (num_tokens, top_k); skip
 * (num_experts) or NULL; add float (num_tokens, hidden_size) or NULL. */
int ktk_moe_forward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                    int64_t num_tokens, int top_k, int dtype, const void *hidden,
                    const int64_t *ids, const float *weights, const uint8_t *skip, const float *add,
                    void *out);

/* One projection of given experts, no bias: x float (rows, in) -> y float (rows, out); gate_up
 * gives gate, then up. Returns a ktk_status. */
int ktk_moe_linear(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int is_down,
                   int64_t num_rows, const float *x, const int64_t *ids, float *y);

/* Adapters of a layer's experts: y = W x + scaling * B (A drop(x)). a: [experts][rank][in], b:
 * [experts][out][rank], of dtype; NULL: the projection has none. */
typedef struct {
    const void *a, *b;
} ktk_adapter;
enum ktk_projection { KTK_GATE, KTK_UP, KTK_DOWN, KTK_PROJECTIONS };
enum { KTK_MAX_RANK = 128 };
typedef struct {
    int32_t rank, dtype;
    float scaling;
    ktk_dropout dropout; /* threshold 0: none */
    ktk_adapter of[KTK_PROJECTIONS];
} ktk_lora;

/* The operator for who holds the pool's lock already. lora may be NULL. scratch: bytes for so many
 * tokens, 64-byte aligned. out may be add. */
int64_t ktk_moe_scratch_bytes(const ktk_layer *layer, const ktk_kernels *kernels, int num_threads,
                              int64_t num_tokens, int top_k, const ktk_lora *lora);
int ktk_moe_run(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                int64_t num_tokens, int top_k, int dtype, const void *hidden, const int64_t *ids,
                const float *weights, const uint8_t *skip, const ktk_lora *lora, const float *add,
                void *out, void *scratch);

/* What training takes from the operator (train.c). lora may be NULL. z float (num_tokens * top_k,
 * projections, down.padded_in): gate and up before the activation, biases included; rows in the
 * order of the operator's groups, up alone without a gate. forward fills it, backward reads it. */
int ktk_moe_forward_saved(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                          int64_t num_tokens, int top_k, int dtype, const void *hidden,
                          const int64_t *ids, const float *weights, const uint8_t *skip,
                          const ktk_lora *lora, float *z, void *out);

/* Gradients, added to what is there. NULL where the adapter is. */
typedef struct {
    float *a, *b;
} ktk_adapter_gradient;

/* From grad (num_tokens, hidden_size), of the output, of grad_dtype: d_hidden likewise, d_weights
 * (num_tokens, top_k), d_lora (KTK_PROJECTIONS). The rest as in forward. Returns a ktk_status. */
int ktk_moe_backward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                     int64_t num_tokens, int top_k, int dtype, const void *hidden,
                     const int64_t *ids, const float *weights, const uint8_t *skip,
                     const ktk_lora *lora, const float *z, int grad_dtype, const void *grad,
                     float *d_hidden, float *d_weights, const ktk_adapter_gradient *d_lora);

/* Sums of outputs that were computed elsewhere (combine.c): out (num_tokens, hidden) of dtype = add
 * + sum over j, in order, of y[place[j]] * weights[j]. y (rows, stride) float, stride a multiple of
 * 16; place, weights (num_tokens, top_k), place -1 adds nothing; add (num_tokens, hidden) or NULL.
 */
void ktk_combine(const ktk_kernels *kernels, ktk_pool *pool, int64_t num_tokens, int64_t hidden,
                 int64_t stride, int top_k, int dtype, const float *y, const int32_t *place,
                 const float *weights, const float *add, void *out);

/* Codes of panels, of 4, 8 or 16 bits, row by row (row_major.c): out (num_rows, row_bytes). codes:
 * the first panel's. */
void ktk_row_major(ktk_pool *pool, const uint8_t *codes, int64_t panel_stride, int64_t num_panels,
                   int bits, int64_t num_rows, int64_t row_bytes, uint8_t *out);

/* A dense matrix: w.num_panels panels, one behind the other. panels NULL: there is none. */
typedef struct {
    ktk_matrix w;
    const uint8_t *panels;
    const float *bias; /* (16 * w.num_panels) or NULL */
    int32_t in_features, out_features;
} ktk_dense;

/* y = x W^T + bias (see linear.c). 0, or 1 when scratch memory cannot be had. x (num_rows,
 * in_features), y (num_rows, out_features) of dtype. */
int ktk_linear_forward(const ktk_dense *m, const ktk_kernels *kernels, ktk_pool *pool,
                       int64_t num_rows, int dtype, const void *x, void *y);

#endif
