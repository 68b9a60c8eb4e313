/* Experts in GGUF block formats times rows of activations, straight from the file's bytes. Plain C11, no Python.h.
 *
 * Weights: rows of out features, each row its blocks one behind the other, as the file has them. Sixteen rows (a panel)
 * are run at a time, one row a lane: their bytes are transposed four at a time, so that a vector holds the same four
 * bytes of all rows, and a format says what these bytes mean (blocks/NAME.h). Few rows of activations are multiplied
 * with what comes out at once; for many it is laid down for a whole panel first, in a buffer that stays in cache.
 *
 * Both ways add the same numbers in the same order, so a token's result does not depend on what it is batched with. */
#ifndef LLAMAFILE_H
#define LLAMAFILE_H

#include <stdint.h>

enum { LF_PANEL = 16, LF_MAX_ROWS = 128 };

/* What activations must be: signed bytes with a scale for every group and a sum for every 16 codes; or fp32; or bf16. */
enum lf_codes { LF_CODES_I8, LF_CODES_F32, LF_CODES_BF16 };

typedef struct {
    const char *name; /* of the ggml type */
    int32_t ggml_type;
    int32_t block_weights, block_bytes;
    int32_t fine; /* weights that share a scale; 0: float formats */
    int32_t is_float;
} lf_format;

/* The formats, lf_num_formats of them; an index into them is what `format` means below. */
extern const lf_format lf_formats[];
extern const int32_t lf_num_formats;

typedef struct {
    int32_t format, is_repacked;
    int32_t in_features;      /* a multiple of 32, and of the format's blocks */
    int32_t activation_group; /* codes per activation scale: 32, 64, 128 */
} lf_matrix;

/* Rows of activations. are_packed: `work` still holds them as the call before packed them: the same rows for the same format,
 * in_features and ISA. Row r: codes + r * code_stride bytes, in_features of them; scales and sums (of 16 codes) for
 * LF_CODES_I8 only. */
typedef struct {
    const uint8_t *codes;
    const float *scales;
    const int32_t *sums;
    int64_t code_stride, scale_stride, sum_stride;
    int are_packed;
} lf_rows;

/* Bytes of 16 rows. */
int64_t lf_panel_bytes(const lf_matrix *w);
/* Bytes of `work` for so many rows. */
int64_t lf_work_bytes(const lf_matrix *w, int num_rows);

/* One ISA's kernels: the best that the CPU has is the caller's choice. */
typedef struct {
    const char *name;
    int32_t bf16_codes; /* what activations of BF16 weights must be here: LF_CODES_F32 or LF_CODES_BF16 */
    /* out[i * out_stride + 16 * p + n] = channel n of panel p times row rows[i], num_rows <= LF_MAX_ROWS of them.
     * panels: 64 bytes aligned if repacked. next: panels wanted afterwards, or NULL. work: lf_work_bytes, 64-byte aligned. */
    void (*gemm)(const lf_matrix *w, const uint8_t *panels, int num_panels, const lf_rows *a,
                 const int32_t *rows, int num_rows, float *out, int64_t out_stride, const uint8_t *next,
                 uint8_t *work);
    /* One panel as it lies in a file to the same bytes in the order they are read in. */
    void (*repack)(const lf_matrix *w, const uint8_t *panel, uint8_t *out);
    /* What a panel holds: signed codes float [in_features][16], scales and minima [in_features / fine][16]; value = code
     * * scale + minimum. Float formats: codes are the values, the rest is not written. work as for one row. For tests. */
    void (*unpack)(const lf_matrix *w, const uint8_t *panel, float *codes, float *scales, float *minima,
                   uint8_t *work);
} lf_kernels;

/* What activations must be: one of lf_codes. */
int lf_codes_of(const lf_kernels *kernels, int format);

/* The ISAs of this build, slowest first; NULL past the last. */
const lf_kernels *lf_kernels_row(int index);

#endif
