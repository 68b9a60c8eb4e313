/* The C side of ktk: shapes of a layer, the kernel table of an ISA row, the operator and the thread
 * pool. Plain C11, no Python.h. Layout of panels: see ktk/experts/layout.py. */
#ifndef KTK_H
#define KTK_H

#include <stdint.h>

enum { KTK_PANEL = 16, KTK_MAX_PARTS = 16 }; /* output channels of a panel; NUMA parts of a layer */

#if defined(__x86_64__)
#define KTK_PAUSE() __builtin_ia32_pause()
#else
#define KTK_PAUSE() ((void)0)
#endif

enum ktk_format { KTK_INT4, KTK_INT8, KTK_BF16, KTK_FP32 };
enum ktk_dtype { KTK_DTYPE_F32, KTK_DTYPE_F16, KTK_DTYPE_BF16 };
enum ktk_activation_kind { KTK_SIGMOID_GLU, KTK_GELU_TANH, KTK_RELU2 };

/* How activation codes lie: one byte a k; or, where bytes cannot be multiplied exactly, int16 with
 * each four k ordered 0 2 1 3; or fp32 as they are; or bf16. */
enum ktk_codes { KTK_CODES_I8, KTK_CODES_I16, KTK_CODES_F32, KTK_CODES_BF16 };

/* out[i*out_stride + 16*p + n] for row index rows[i] (at most w->max_rows), panels p at panels + p*panel_bytes.
 * next: the panels that this thread will probably want afterwards, or NULL; work: w->work_bytes of this thread, 64-byte
 * aligned. */
typedef struct ktk_matrix ktk_matrix;
typedef struct ktk_rows ktk_rows;
typedef void ktk_gemm_fn(const ktk_matrix *w, const uint8_t *panels, int num_panels, const ktk_rows *a,
                         const int32_t *rows, int num_rows, float *out, int64_t out_stride,
                         const uint8_t *next, uint8_t *work);

struct ktk_matrix {
    int32_t format;           /* ktk_format; of GGUF blocks the index into lf_formats */
    int32_t padded_in;        /* multiple of 32 */
    int32_t num_panels;       /* of one projection */
    int32_t group_size;       /* k per weight scale; padded_in = per channel; of packed formats */
    int32_t activation_group; /* k per activation scale */
    int32_t scales_are_bf16;
    int64_t code_offset; /* in a panel; scales come first; of packed formats */
    int64_t panel_bytes; /* codes and scales */
    /* What the operator needs to know of the kernel: */
    ktk_gemm_fn *gemm;
    const void *blocks; /* lf_kernels, of GGUF blocks */
    int32_t is_repacked;
    int32_t codes_kind; /* ktk_codes of its activations */
    int32_t fine_group; /* k per correction */
    int32_t zero_point; /* correction = -zero_point * sum of codes */
    int32_t max_rows;   /* of a call */
    int64_t work_bytes;
};

typedef struct {
    int32_t kind, has_gate;
    float alpha, gate_min, gate_max, up_min, up_max, up_offset;
} ktk_activation;

/* A part of every expert: some panels of gate|up and of down, and all biases. One part: the expert as it is. The tables
 * hold a pointer for each expert. up: NULL where the panels of gate and up alternate behind gate_up (or there is no
 * gate). Biases: NULL without. */
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
} ktk_layer;

/* Rows of quantised activations; for float formats codes holds float and the rest is unused. */
struct ktk_rows {
    uint8_t *codes;
    float *scales;       /* [rows][scale_stride] */
    int32_t *correction; /* [rows][correction_stride]: -zero_point * sum of codes, per fine group */
    int64_t code_stride; /* bytes */
    int64_t scale_stride, correction_stride;
    int are_packed; /* the work memory still holds these rows as the call before packed them, for the same kernel and format */
};

/* Rows of a call and work of the packed formats' kernels: the fixed part is what AMX kernels keep beside the rows. */
enum { KTK_MAX_ROWS = 64 };
#define KTK_WORK_BYTES(code_stride) (2 * KTK_MAX_ROWS * (code_stride) + 65536)

/* Keys of a call of attend, and of those the ones that are converted at a time. */
enum { KTK_ATTEND_KEYS = 256, KTK_ATTEND_TILE = 16 };
#define KTK_ATTEND_WORK(group, head_dim) (KTK_ATTEND_TILE * (head_dim) + (group) * KTK_ATTEND_KEYS)

/* One ISA row's kernels. */
typedef struct {
    const char *name;
    ktk_gemm_fn *gemm[4];  /* by ktk_format */
    int32_t codes_kind[4]; /* ktk_codes each wants, by ktk_format */
    /* x float[n] (n a multiple of 32) to codes, one scale per group, one correction per fine group.
     */
    void (*quantise)(const float *x, int n, int group, int fine, int zero_point, int codes_kind,
                     uint8_t *codes, float *scales, int32_t *correction);
    /* Columns in panels of 16 that lie `step` floats apart (gate: NULL without one) -> h, 16*panels floats. */
    void (*activate)(const ktk_activation *act, const float *gate, const float *up, int step, int num_panels,
                     const float *gate_bias, const float *up_bias, float *h);
    void (*load)(int dtype, const void *src, int64_t n, float *dst);
    void (*store)(int dtype, const float *src, int64_t n, void *dst);
    /* acc[i] = sum over j, in order, of y[place[j]*stride + i] * weights[j], one fma each; place -1 adds nothing;
     * n a multiple of 16 */
    void (*combine)(const float *y, int64_t stride, const int32_t *place, const float *weights, int top_k,
                    int n, float *acc);
    void (*add)(float *acc, const float *y, int64_t n);
    /* Attention of `group` rows of q (group, head_dim; already scaled) over `count` <= KTK_ATTEND_KEYS keys and values
     * (count, head_dim) of dtype: out (group, head_dim) = sum over keys of exp(score - most[0]) * value; most
     * (group, 2): the largest score, and the sum of these exponentials. head_dim: a multiple of 16. work:
     * KTK_ATTEND_WORK(group, head_dim) floats. */
    void (*attend)(int dtype, int head_dim, int group, const float *q, const void *keys, const void *values,
                   int count, float *work, float *out, float *most);
    /* One panel of weights, 16 rows of in_features (src[r] NULL = zeros), searched scales; panel is
     * written. Returns 0, or 1 if a weight is NaN or inf. work: 2 * padded_in * 16 floats. */
    int (*pack_panel)(const ktk_matrix *w, int in_features, const void *const *src, int src_is_bf16,
                      const float *ladder, int num_ladder, int refits, float *work, uint8_t *panel);
} ktk_kernels;

/* The rows of this build, slowest first (ktk/_cy/isa.py); NULL past the last. */
const ktk_kernels *ktk_kernels_row(int index);

/* Thread pool: the caller and num_threads - 1 workers run fn(context, task, thread). The threads are split evenly over
 * num_parts; task lists [begin[i], begin[i + 1]) belong to part i, whose threads take from them first, in order.
 * num_threads >= num_parts. cores: num_threads masks of the CPUs that each may run on, or NULL; the caller's is left free.
 * Workers spin for a moment after a run, then sleep. The pool also owns the operator's scratch memory. */
typedef struct ktk_pool ktk_pool;
typedef void ktk_task_fn(void *context, int64_t task, int thread);
/* may_borrow: see ktk_pool_borrow. NULL: no memory or no threads. */
ktk_pool *ktk_pool_new(int num_threads, int num_parts, const void *cores, int may_borrow);
void ktk_pool_run(ktk_pool *pool, ktk_task_fn *fn, void *context, const int64_t *begin, int num_lists);
int ktk_pool_num_threads(const ktk_pool *pool);
void ktk_pool_lock(ktk_pool *pool); /* one operator at a time */
void ktk_pool_unlock(ktk_pool *pool);
void *ktk_pool_scratch(ktk_pool *pool, int64_t size); /* while locked; NULL: no memory */
void ktk_pool_free(ktk_pool *pool);
/* IEEE rounding and denormals on this thread; gives and takes back the mode the caller had. */
unsigned ktk_float_mode_enter(void);
void ktk_float_mode_leave(unsigned callers);
/* From now on runs use the threads of the OpenMP runtime whose GOMP_parallel this is (until a fork; NULL: no more) ... */
void ktk_pool_borrow(void *gomp_parallel);
/* ... but not those that the calling thread starts. */
void ktk_pool_own_threads_only(void);

/* Fill in what the operator needs to know of a packed matrix: format to activation_group are set. */
void ktk_use_packed(ktk_matrix *m, const ktk_kernels *kernels);
/* A matrix in GGUF blocks: format an index into lf_formats, isa into lf_kernels_row. */
void ktk_use_blocks(ktk_matrix *m, int format, int isa, int in_features, int num_panels, int activation_group,
                    int is_repacked);

/* The operator (see moe.c). 0, or 1 when scratch memory cannot be had.
 * hidden, out (num_tokens, hidden_size) of dtype; ids, weights (num_tokens, top_k); skip
 * (num_experts) or NULL; add float (num_tokens, hidden_size) or NULL. */
int ktk_moe_forward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int64_t num_tokens,
                    int top_k, int dtype, const void *hidden, const int64_t *ids, const float *weights,
                    const uint8_t *skip, const float *add, void *out);

/* One projection of given experts, no bias: x float (rows, in) -> y float (rows, out); gate_up
 * gives gate, then up. */
int ktk_moe_linear(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int is_down,
                   int64_t num_rows, const float *x, const int64_t *ids, float *y);

/* y = x W^T + bias (see linear.c). 0, or 1 when scratch memory cannot be had. x (num_rows, in_features), y (num_rows,
 * out_features) of dtype; panels: w->num_panels, one behind the other; bias float (16 * num_panels) or NULL. */
int ktk_linear_forward(const ktk_matrix *w, const uint8_t *panels, const float *bias, int in_features,
                       int out_features, const ktk_kernels *kernels, ktk_pool *pool, int64_t num_rows,
                       int dtype, const void *x, void *y);

#endif
