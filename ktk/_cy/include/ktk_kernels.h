/* What kernels are given and what a table of them holds: formats, a matrix, rows of activations,
 * one ktk_kernels per ISA level. Plain C11; vendor/llamafile includes it, too. */
#ifndef KTK_KERNELS_H
#define KTK_KERNELS_H

#include <stdint.h>

#include "ktk_levels.h"
#include "lf_formats.h"

enum { KTK_PANEL = 16 }; /* output channels of a panel */

/* Codes of checkpoints as they are, few bits each, and a scale a block: coded.h. */
#define KTK_CODED_FORMATS(ROW)                                                                     \
    ROW(MXFP4, mxfp4)                                                                              \
    ROW(NVFP4, nvfp4)                                                                              \
    ROW(INT4_ASYM, int4_asym)                                                                      \
    ROW(FP8, fp8)                                                                                  \
    ROW(FP8_CHANNEL, fp8_channel)                                                                  \
    ROW(FP8_E5M2, fp8_e5m2)                                                                        \
    ROW(MXFP8, mxfp8)
/* Panels of ktk/experts/layout.py: ROW(ENUM, "name", zero point of the codes, whether they are
 * floats, codes of a correction or 0: as many as the smaller group has). */
#define KTK_PANEL_FORMATS(ROW)                                                                     \
    ROW(NL2, "nl2", KTK_LEVEL_ZERO, 0, 16)                                                         \
    ROW(NL3, "nl3", KTK_LEVEL_ZERO, 0, 16)                                                         \
    ROW(NL4, "nl4", KTK_LEVEL_ZERO, 0, 16)                                                         \
    ROW(INT4, "int4", 8, 0, 0)                                                                     \
    ROW(INT8, "int8", 128, 0, 0)                                                                   \
    ROW(MXFP4, "mxfp4", KTK_E2M1_ZERO, 0, 0)                                                       \
    ROW(NVFP4, "nvfp4", KTK_E2M1_ZERO, 0, 0)                                                       \
    ROW(INT4_ASYM, "int4_asym", 1, 0, 0)                                                           \
    ROW(FP8, "fp8", 0, 1, 0)                                                                       \
    ROW(FP8_CHANNEL, "fp8_channel", 0, 1, 0)                                                       \
    ROW(FP8_E5M2, "fp8_e5m2", 0, 1, 0)                                                             \
    ROW(MXFP8, "mxfp8", 0, 1, 0)                                                                   \
    ROW(BF16, "bf16", 0, 1, 0)                                                                     \
    ROW(FP32, "fp32", 0, 1, 0)

/* Every format that a gemm reads; of blocks KTK_BLOCK_q4_k and so on. */
#define PANEL_ROW(ENUM, ...) KTK_##ENUM,
#define BLOCK_ROW(NAME, ...) KTK_BLOCK_##NAME,
enum ktk_format {
    KTK_PANEL_FORMATS(PANEL_ROW) LF_FLOAT_FORMATS(BLOCK_ROW) LF_INTEGER_FORMATS(BLOCK_ROW)
        KTK_NUM_FORMATS
};
#undef PANEL_ROW
#undef BLOCK_ROW

/* What is known of a format without a matrix. */
typedef struct {
    const char *name; /* as Python's table of formats has it; of blocks the ggml type's */
    int32_t is_float;
    /* correction = -zero_point * sum of codes; of blocks -1: the sum itself, of 16 codes each */
    int32_t zero_point, sums_of; /* sums_of 0: as many as the smaller group has */
    /* of blocks; fine: weights that share a scale, 0: floats; row_head: bytes before a row's */
    int32_t block_weights, block_bytes, fine, row_head;
} ktk_format_row;
extern const ktk_format_row ktk_formats[KTK_NUM_FORMATS];

enum ktk_dtype { KTK_DTYPE_F32, KTK_DTYPE_F16, KTK_DTYPE_BF16, KTK_DTYPE_I8 };
/* KTK_DTYPE_I8 is of cached keys and values alone: a row is its codes, then its scale, an fp32. */
enum { KTK_ROW_SCALE = 4 };
enum ktk_activation_kind { KTK_SIGMOID_GLU, KTK_GELU_TANH, KTK_RELU2 };

/* How activation codes lie: one byte a k; or, where bytes cannot be multiplied exactly, int16 with
 * each four k ordered 0 2 1 3; or fp32 as they are; or bf16; or fp32 times KTK_ROWS_HIGH, for
 * weights that are taken too small; or ktk_planes. */
enum ktk_codes {
    KTK_CODES_I8,
    KTK_CODES_I16,
    KTK_CODES_F32,
    KTK_CODES_BF16,
    KTK_CODES_F32_HIGH,
    KTK_CODES_PLANES
};
#define KTK_ROWS_HIGH 0x1p64f

/* 32 k of integers within +-KTK_PLANES_MOST, for weights of 4 bits: as fp32, and as KTK_PLANE_BASE
 * * high + low, four k of high and the same of low in turn. Sums of 32 products with up to 15 are
 * exact in fp32, of 16 bytes with up to 24 in int16. */
enum {
    KTK_PLANES_K = 32,
    KTK_PLANE_BASE = 171,
    KTK_PLANES_MOST = 85 * KTK_PLANE_BASE + 85,
    KTK_E2M1_ZERO = 12 /* of e2m1 as its doubled value and so many */
};
typedef struct {
    float codes[KTK_PLANES_K];
    int8_t planes[KTK_PLANES_K / 4][2][4];
} ktk_planes;

typedef struct ktk_gemm_args ktk_gemm_args;
typedef void ktk_gemm_fn(const ktk_gemm_args *args);

/* Sixteen rows of weights are a panel. Packed ones: scales first, then codes, see layout.py.
 * Blocks: 16 rows as the file has them, or the same bytes in the order kernels read them
 * (is_repacked). */
typedef struct {
    int32_t format;           /* ktk_format */
    int32_t padded_in;        /* multiple of 32, and of a block's weights */
    int32_t num_panels;       /* of one projection */
    int32_t group_size;       /* k per weight scale; padded_in = per channel; of packed formats */
    int32_t activation_group; /* k per activation scale */
    int32_t scales_are_bf16;
    int32_t multiplier_group; /* k per multiplier, 16 or 32, or per zero point; 0: none */
    int32_t is_repacked;
    int32_t rotation; /* columns of a block that turn together (rows.c), 64 or 256; 0: none */
    uint32_t rotation_seed;
    int64_t code_offset; /* in a panel; scales come first; of packed formats */
    int64_t panel_bytes; /* codes and scales */
    /* What callers need to know of the kernel; ktk_use_kernels fills it in. */
    ktk_gemm_fn *gemm;
    int32_t codes_kind; /* ktk_codes of its activations */
    int32_t fine_group; /* k per correction */
    int32_t zero_point; /* correction = -zero_point * sum of codes */
    int32_t max_rows;   /* of a call */
    int64_t work_bytes;
} ktk_matrix;

/* Rows of quantised activations; for float formats codes holds floats and the rest is unused. */
typedef struct {
    uint8_t *codes;
    float *scales; /* [rows][scale_stride] */
    /* [rows][correction_stride]: -zero_point * sum of codes, per fine group; with KTK_LEVEL_ZERO
     * the low half alone */
    int32_t *correction;
    int64_t code_stride; /* bytes */
    int64_t scale_stride, correction_stride;
    /* The work memory still holds these rows as the call before packed them, for the same kernel.
     */
    int are_packed;
} ktk_rows;

/* One call of a gemm: out[i*out_stride + 16*p + n] = channel n of panel p times row rows[i]. */
struct ktk_gemm_args {
    const ktk_matrix *w;
    const uint8_t
        *panels; /* panel p at panels + p * w->panel_bytes; repacked blocks 64-byte aligned */
    int num_panels;
    const ktk_rows *a;
    const int32_t *rows;
    int num_rows; /* at most w->max_rows */
    float *out;
    int64_t out_stride;
    const uint8_t *next; /* the panels that this thread will probably want afterwards, or NULL */
    uint8_t *work;       /* w->work_bytes of this thread, 64-byte aligned */
};

/* Products of fp32 (products_f32.c). c[m][j] (+)= sum over k of a[m][k] * b[j][k], k in panels of
 * 16: row m of a is row rows[m] (NULL: m) of a_stride floats; b's 16 k of panel p and column j lie
 * at p * b_panel + j * b_column; c[m][j] at m * c_stride + j. */
typedef struct {
    const float *a, *b;
    const int32_t *rows;
    float *c;
    int64_t a_stride, b_panel, b_column, c_stride;
    int32_t num_rows, num_columns, num_panels, is_added;
} ktk_product_nt;

/* c[m][j] (+)= sum over k of a[m * a_row + k * a_k] * b[k * b_stride + j]; num_columns a multiple
 * of 16. */
typedef struct {
    const float *a, *b;
    float *c;
    int64_t a_row, a_k, b_stride, c_stride;
    int32_t num_rows, num_columns, num_k, is_added;
} ktk_product_nn;

/* k [first, first + num_k), multiples of 32 and of a block's weights, of a panel's 16 channels as
 * they are multiplied: out float [num_k][16]. Rotated ones stay rotated. */
typedef void ktk_decode_fn(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                           float *out);

/* The same of integer panels for products_i16.c: codes int16 [num_k][16], less the zero point,
 * times multipliers, which their group's scales of ktk_kernels.scales multiply. Channels in its
 * order. */
typedef void ktk_codes_fn(const ktk_matrix *w, const uint8_t *panel, int first, int num_k,
                          int16_t *out);

/* c[m][j] (+)= scales[m] * sum over n of a[m][n] * b[n][j], exactly; 16 n of panel p and column j
 * lie at p * b_panel + 16 * j of b, at 16 * p of row m of a. At most KTK_I16_PANELS. */
enum { KTK_I16_PANELS = 32 };
typedef struct {
    const int16_t *a, *b;
    const float *scales;
    float *c;
    int64_t a_stride, b_panel, c_stride;
    int32_t num_rows, num_columns, num_panels, is_added;
} ktk_product_i16;

/* Of 2^32 random numbers those below the threshold make a zero; other values are times scale. */
typedef struct {
    uint32_t seed, threshold;
    float scale;
} ktk_dropout;

/* A kernel and its block sizes. */
typedef struct {
    ktk_gemm_fn *run;
    const char *isa;    /* the level that it was compiled for */
    int32_t codes_kind; /* ktk_codes */
    /* Rows of a call: as many as have rows_bytes in bytes of one code a k, within these. */
    int32_t fewest_rows, most_rows, rows_bytes;
    /* Bytes of work: fixed, and for each row `row` and `row_32k` for each 32 k. */
    struct {
        int32_t fixed, row, row_32k;
    } work;
} ktk_gemm;

/* Panels of the operator's tasks, most: of gate or up, of down; and of down where threads would
 * idle. */
enum { KTK_MAX_UP_PANELS = 16, KTK_MAX_DOWN_PANELS = 64 };
typedef struct {
    int32_t up_panels, down_panels, least_down_panels;
} ktk_task_sizes;

typedef struct {
    int32_t kind, has_gate;
    float alpha, gate_min, gate_max, up_min, up_max, up_offset;
} ktk_activation;

/* Keys of a call of attend, and of those the ones that are converted at a time; query heads of a
 * task. */
enum { KTK_ATTEND_KEYS = 256, KTK_ATTEND_TILE = 16, KTK_ATTEND_QUERIES = 16 };
/* Floats of a query's scores: whole vectors from anywhere on. */
enum { KTK_ATTEND_SCORES = KTK_ATTEND_KEYS + 16 };

/* Rows of cached tokens: a pointer for each KTK_ATTEND_TILE of them. */
typedef struct {
    const void *const *tiles;
    int64_t row_stride; /* elements */
    int32_t dim;        /* a multiple of 16 */
} ktk_tiles;

/* Queries, of tokens that follow each other and of heads, over the tokens of one chunk. begin and
 * end (of each, 0 <= begin < end <= KTK_ATTEND_KEYS) count from the first tile's first token. */
typedef struct {
    int32_t dtype, num_queries;         /* <= KTK_ATTEND_QUERIES */
    const float *q[KTK_ATTEND_QUERIES]; /* (keys.dim + more.dim,), already scaled */
    int32_t begin[KTK_ATTEND_QUERIES], end[KTK_ATTEND_QUERIES];
    float *out[KTK_ATTEND_QUERIES];  /* (values.dim,): see ktk_kernels.attend */
    float *most[KTK_ATTEND_QUERIES]; /* (2,) */
    ktk_tiles keys, more, values;    /* a key is keys' row, then more's, whose dim may be 0 */
} ktk_attend;

static inline int64_t ktk_attend_width(int keys, int more, int values) {
    const int wide = keys > more ? keys : more;
    return wide > values ? wide : values;
}

/* One ISA level's kernels, or what one source gives a level: NULL where it gives nothing. */
typedef struct {
    const char *name;
    ktk_gemm gemm[KTK_NUM_FORMATS];
    ktk_decode_fn *decode[KTK_NUM_FORMATS];
    ktk_codes_fn *codes[KTK_NUM_FORMATS]; /* of integer panels */
    ktk_task_sizes tasks;
    /* x float[n] (n a multiple of 16) to codes, one scale per group, one correction per fine group.
     */
    void (*quantise)(const float *x, int n, int group, int fine, int zero_point, int codes_kind,
                     uint8_t *codes, float *scales, int32_t *correction);
    /* x float[n] in place, n a multiple of width: ktk/experts/rotation.py, columns `first` and on
     */
    void (*rotate)(float *x, int64_t first, int n, int width, uint32_t seed);
    /* The same undone. */
    void (*rotate_back)(float *x, int64_t first, int n, int width, uint32_t seed);
    /* n columns of a row, a multiple of 16, each from its own random number
     * (ktk/reference/gradients.py). */
    void (*drop)(const ktk_dropout *d, uint32_t row, int first, int n, float *x);
    /* Scales of a panel's 16 channels for the group of k. */
    void (*scales)(const ktk_matrix *w, const uint8_t *panel, int k, float *out);
    void (*product_i16)(const ktk_product_i16 *p);
    /* The largest |x * scales| (scales NULL: |x|) of n, a multiple of 16; NaN if one is inf or NaN.
     */
    float (*largest)(const float *x, const float *scales, int n);
    /* x * scales * by, within +-32767, to codes for product_i16. */
    void (*round_i16)(const float *x, float by, const float *scales, int n, int16_t *out);
    void (*product_nt)(const ktk_product_nt *p);
    void (*product_nn)(const ktk_product_nn *p);
    /* h, and the gradients of gate (NULL without one) and up, biases included, from that of h; n a
     * multiple of 16. */
    void (*activate_back)(const ktk_activation *act, const float *gate, const float *up,
                          const float *d_h, int n, float *h, float *d_gate, float *d_up);
    /* Columns in panels of 16 that lie `step` floats apart (gate: NULL without one) -> h, 16*panels
     * floats. */
    void (*activate)(const ktk_activation *act, const float *gate, const float *up, int step,
                     int num_panels, const float *gate_bias, const float *up_bias, float *h);
    void (*load)(int dtype, const void *src, int64_t n, float *dst);
    void (*store)(int dtype, const float *src, int64_t n, void *dst);
    /* acc[i] = sum over j, in order, of y[place[j]*stride + i] * weights[j], one fma each; place -1
     * adds nothing; n a multiple of 16 */
    void (*combine)(const float *y, int64_t stride, const int32_t *place, const float *weights,
                    int top_k, int n, float *acc);
    void (*add)(float *acc, const float *y, int64_t n);
    /* Each query's out = sum over its tokens, in order, of exp(score - most[0]) * value; most: its
     * largest score, and the sum of these exponentials. work: KTK_ATTEND_TILE * ktk_attend_width +
     * num_queries * KTK_ATTEND_SCORES floats. A query's bits do not depend on the others. */
    void (*attend)(const ktk_attend *a, float *work);
    /* One panel of weights, 16 rows of in_features (src[r] NULL = zeros), searched scales; panel is
     * written. Returns 0, or 1 if a weight is NaN or inf. work: 2 * padded_in * 16 floats. */
    int (*pack_panel)(const ktk_matrix *w, int in_features, const void *const *src, int src_is_bf16,
                      const float *ladder, int num_ladder, int refits, float *work, uint8_t *panel);
    /* One panel of blocks as it lies in a file to the same bytes in the order they are read in. */
    void (*repack)(const ktk_matrix *w, const uint8_t *panel, uint8_t *out);
    /* What a panel of blocks holds: signed codes float [padded_in][16], scales and minima
     * [padded_in / fine][16]; value = code * scale + minimum. Float formats: codes are the values,
     * the rest is not written. work: 64 * padded_in bytes, 64-byte aligned. For tests. */
    void (*unpack)(const ktk_matrix *w, const uint8_t *panel, float *codes, float *scales,
                   float *minima, uint8_t *work);
} ktk_kernels;

/* Every function of ktk_kernels, in order. */
#define KTK_FUNCTIONS(EACH)                                                                        \
    EACH(quantise)                                                                                 \
    EACH(rotate)                                                                                   \
    EACH(rotate_back)                                                                              \
    EACH(drop)                                                                                     \
    EACH(scales)                                                                                   \
    EACH(product_i16)                                                                              \
    EACH(largest)                                                                                  \
    EACH(round_i16)                                                                                \
    EACH(product_nt)                                                                               \
    EACH(product_nn)                                                                               \
    EACH(activate_back)                                                                            \
    EACH(activate)                                                                                 \
    EACH(load)                                                                                     \
    EACH(store) EACH(combine) EACH(add) EACH(attend) EACH(pack_panel) EACH(repack) EACH(unpack)

/* Text of a macro's value: the names of levels. */
#define KTK_TEXT_(x) #x
#define KTK_TEXT(x) KTK_TEXT_(x)

#endif
