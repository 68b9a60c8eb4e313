# Every C struct and function that native.pyx uses, declared once; what they mean stands in the
# headers.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint8_t, uint64_t


cdef extern from "ktk_probe.h" nogil:
    uint64_t ktk_probe_features(int asks_for_tiles, int *refused)
    const char *ktk_probe_feature_name(int index)
    int ktk_probe_num_features()


cdef extern from "ktk.h" nogil:
    enum: KTK_DONE, KTK_ABSENT, KTK_NOT_BROUGHT, KTK_AWAITED_IN_VAIN
    enum: KTK_HERE, KTK_COMING, KTK_LOST
    enum: KTK_NUM_FORMATS
    enum: KTK_DTYPE_F32, KTK_DTYPE_F16, KTK_DTYPE_BF16, KTK_DTYPE_I8
    enum: KTK_SIGMOID_GLU, KTK_GELU_TANH, KTK_RELU2
    enum: KTK_MAX_PARTS

    ctypedef struct ktk_format_row:
        const char *name
        int32_t is_float
        int32_t block_weights
        int32_t block_bytes
        int32_t fine
        int32_t row_head

    const ktk_format_row *ktk_formats

    ctypedef struct ktk_matrix:
        int32_t format
        int32_t padded_in
        int32_t num_panels
        int32_t group_size
        int32_t activation_group
        int32_t scales_are_bf16
        int32_t multiplier_group
        int32_t is_repacked
        int32_t rotation
        uint32_t rotation_seed
        int64_t code_offset
        int64_t panel_bytes
        int64_t work_bytes

    ctypedef struct ktk_activation:
        int32_t kind
        int32_t has_gate
        float alpha
        float gate_min
        float gate_max
        float up_min
        float up_max
        float up_offset

    ctypedef struct ktk_part:
        const uint8_t **gate_up
        const uint8_t **up
        const uint8_t **down
        const float **gate_bias
        const float **up_bias
        const float **down_bias
        int32_t first_up_panel
        int32_t num_up_panels
        int32_t first_down_panel
        int32_t num_down_panels

    struct ktk_lock:
        pass
    ktk_lock *ktk_lock_new(int num_experts)
    void ktk_lock_free(ktk_lock *lock)

    ctypedef struct ktk_layer:
        int32_t num_experts
        int32_t hidden_size
        int32_t intermediate_size
        ktk_matrix gate_up
        ktk_matrix up
        ktk_matrix down
        ktk_activation activation
        int32_t num_parts
        ktk_part *parts
        int64_t num_absent
        ktk_lock *lock

    void ktk_set_address(ktk_layer *layer, const void **entry, const void *address)
    void ktk_put_address(ktk_layer *layer, const void **entry, const void *address)
    void ktk_set_arrival(ktk_layer *layer, int64_t expert, int arrival)

    ctypedef int (*pack_panel_fn)(const ktk_matrix *, int, const void *const *, int, const float *,
                                  int, int, float *,
                                  uint8_t *) noexcept nogil

    ctypedef struct ktk_gemm:
        const char *isa

    ctypedef struct ktk_kernels:
        const char *name
        const ktk_gemm *gemm
        pack_panel_fn pack_panel
        void (*repack)(const ktk_matrix *w, const uint8_t *panel, uint8_t *out) noexcept nogil
        void (*unpack)(const ktk_matrix *w, const uint8_t *panel, float *codes, float *scales,
                       float *minima,
                       uint8_t *work) noexcept nogil

    const ktk_kernels *ktk_kernels_row(int index)
    void ktk_use_kernels(ktk_matrix *m, const ktk_kernels *kernels)

    ctypedef struct ktk_pool:
        pass
    ktk_pool *ktk_pool_new(int num_threads, int num_parts, const void *cores, int may_borrow)
    void ktk_pool_free(ktk_pool *pool)
    void ktk_pool_borrow(void *gomp_parallel)
    int ktk_pool_own_threads_only(int is_only)
    unsigned ktk_float_mode_enter()
    void ktk_float_mode_leave(unsigned callers)
    int ktk_moe_forward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                        int64_t num_tokens,
                        int top_k, int dtype, const void *hidden, const int64_t *ids,
                        const float *weights,
                        const uint8_t *skip, const float *add, void *out)

    enum: KTK_PROJECTIONS

    ctypedef struct ktk_dropout:
        uint32_t seed
        uint32_t threshold
        float scale

    ctypedef struct ktk_adapter:
        const void *a
        const void *b

    ctypedef struct ktk_lora:
        int32_t rank
        int32_t dtype
        float scaling
        ktk_dropout dropout
        ktk_adapter *of

    ctypedef struct ktk_adapter_gradient:
        float *a
        float *b

    int ktk_moe_forward_saved(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                              int64_t num_tokens, int top_k, int dtype, const void *hidden,
                              const int64_t *ids, const float *weights, const uint8_t *skip,
                              const ktk_lora *lora, float *z, void *out)
    int ktk_moe_backward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                         int64_t num_tokens, int top_k, int dtype, const void *hidden,
                         const int64_t *ids, const float *weights, const uint8_t *skip,
                         const ktk_lora *lora, const float *z, int grad_dtype, const void *grad,
                         float *d_hidden, float *d_weights, const ktk_adapter_gradient *d_lora)
    void ktk_combine(const ktk_kernels *kernels, ktk_pool *pool, int64_t num_tokens, int64_t hidden,
                     int64_t stride, int top_k, int dtype, const float *y, const int32_t *place,
                     const float *weights, const float *add, void *out)
    void ktk_row_major(ktk_pool *pool, const uint8_t *codes, int64_t panel_stride,
                       int64_t num_panels, int bits, int64_t num_rows, int64_t row_bytes,
                       uint8_t *out)
    int ktk_moe_linear(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                       int is_down,
                       int64_t num_rows, const float *x, const int64_t *ids, float *y)

    ctypedef struct ktk_dense:
        ktk_matrix w
        const uint8_t *panels
        const float *bias
        int32_t in_features
        int32_t out_features

    int ktk_linear_forward(const ktk_dense *m, const ktk_kernels *kernels, ktk_pool *pool,
                           int64_t num_rows, int dtype,
                           const void *x, void *y)


cdef extern from "ktk_arrivals.h" nogil:
    enum: KTK_COLD, KTK_READY, KTK_OURS, KTK_OTHERS
    enum: KTK_BROUGHT, KTK_RELEASED, KTK_CAME, KTK_FAILED
    enum: KTK_CLAIMED, KTK_FORETOLD, KTK_SAVED, KTK_CANCELLED
    enum: KTK_MAX_TABLES

    ctypedef struct ktk_streamed_layer:
        ktk_layer *layer
        const void **entries
        int32_t num_tables
        int32_t fd
        int64_t *offsets
        int64_t first
        int64_t num_bytes

    ctypedef struct ktk_arrivals:
        pass
    ktk_arrivals *ktk_arrivals_new(int num_layers, int num_experts, uint8_t *memory,
                                   int64_t slot_bytes, uint8_t *standing, const uint8_t *checked,
                                   int num_readers)
    void ktk_arrivals_free(ktk_arrivals *a)
    int ktk_arrivals_start(ktk_arrivals *a)
    void ktk_arrivals_stop(ktk_arrivals *a)
    void ktk_arrivals_lock(ktk_arrivals *a)
    void ktk_arrivals_unlock(ktk_arrivals *a)
    int ktk_arrivals_wait(ktk_arrivals *a)
    void ktk_arrivals_set_layer(ktk_arrivals *a, int layer, const ktk_streamed_layer *given)
    void ktk_arrivals_turn(ktk_arrivals *a, int is_on)
    void ktk_arrivals_ask(ktk_arrivals *a, int change)
    int ktk_arrivals_offer(ktk_arrivals *a, int32_t key, int32_t slot)
    int ktk_arrivals_take(ktk_arrivals *a, int32_t *key, int32_t *slot)
    int ktk_arrivals_keep(ktk_arrivals *a, int32_t key)
    int ktk_arrivals_num_offered(const ktk_arrivals *a)
    void ktk_arrivals_hurry(ktk_arrivals *a, int32_t key)
    const int32_t *ktk_arrivals_events(ktk_arrivals *a, int64_t *num)

    ctypedef struct ktk_held:
        ktk_arrivals *arrivals
    void ktk_arrivals_release(ktk_held *held)


cdef extern from "ktk_decoder.h" nogil:
    enum: KTK_SOFTMAX, KTK_SIGMOID
    enum: KTK_ROTARY_HALVES, KTK_ROTARY_PAIRS, KTK_ROTARY_PAIRS_TO_HALVES
    enum: KTK_ATTENTION, KTK_LATENT_ATTENTION, KTK_MLP, KTK_ROUTED
    enum: KTK_MAX_COMPONENTS

    ctypedef struct ktk_paged:
        void **pages
        int64_t head_stride
        int64_t row_stride

    ctypedef struct ktk_sequence:
        ktk_paged keys
        ktk_paged values
        int64_t page_tokens
        int32_t dtype

    ctypedef int ktk_bring(void *caller, void *owner, int64_t num_ids, const int64_t *ids,
                           const float *weights, int64_t num_foretold, const int64_t *foretold)

    ctypedef struct ktk_decoder_rows:
        int32_t num_rows
        const ktk_sequence *sequences
        const int32_t *sequence
        const int64_t *position
        const float *cosines
        const float *sines
        int64_t *chosen
        ktk_bring *bring
        void *caller
        ktk_held *held

    ctypedef struct ktk_norm:
        const float *weight
        int32_t size
        float epsilon

    ctypedef struct ktk_rotary:
        int32_t dim
        int32_t order

    ctypedef struct ktk_attention:
        int32_t num_heads
        int32_t num_kv_heads
        int32_t head_dim
        int32_t window
        float scaling
        ktk_rotary rotary
        ktk_norm q_norm
        ktk_norm k_norm
        const float *sinks
        ktk_dense q
        ktk_dense k
        ktk_dense v
        ktk_dense o

    ctypedef struct ktk_latent_attention:
        int32_t num_heads
        int32_t nope_dim
        int32_t latent_dim
        int32_t value_dim
        float scaling
        ktk_rotary rotary
        ktk_dense q_a
        ktk_norm q_norm
        ktk_dense q
        ktk_dense latent
        ktk_norm latent_norm
        ktk_dense absorb
        ktk_dense expand
        ktk_dense o

    ctypedef struct ktk_mlp:
        ktk_dense gate
        ktk_dense up
        ktk_dense down
        ktk_activation activation
        const float *scale

    ctypedef struct ktk_router:
        int32_t num_experts
        int32_t top_k
        int32_t score
        int32_t num_groups
        int32_t top_groups
        int32_t best_of_group
        int32_t is_normalised
        float scale
        const float *correction

    ctypedef struct ktk_foresight:
        int32_t is_on
        ktk_dense logits
        ktk_router router
        const ktk_layer *experts

    ctypedef struct ktk_routed:
        ktk_dense logits
        ktk_router router
        const ktk_layer *experts
        const ktk_lora *lora
        void *owner
        ktk_arrivals *arrivals
        int32_t number
        const ktk_foresight *foresight

    ctypedef struct ktk_component:
        int32_t kind
        const void *part

    ctypedef struct ktk_branch:
        ktk_norm norm
        ktk_norm output_norm
        float multiplier
        int32_t num_components
        ktk_component components[3]

    ctypedef struct ktk_decoder_layer:
        int32_t hidden_size
        int32_t num_branches
        const ktk_branch *branches

    void ktk_route(const ktk_router *router, const float *logits, float *scores, int64_t *ids,
                   float *weights)
    int ktk_decoder_layer_forward(const ktk_decoder_layer *layer, const ktk_kernels *kernels,
                                  ktk_pool *pool,
                                  int dtype, const void *hidden, const ktk_decoder_rows *rows,
                                  void *out)


cdef extern from "sched.h" nogil:
    ctypedef struct cpu_set_t:
        pass
    void CPU_ZERO(cpu_set_t *cpus)
    void CPU_SET(int cpu, cpu_set_t *cpus)
    int CPU_SETSIZE
