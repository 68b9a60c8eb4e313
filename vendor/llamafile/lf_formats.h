/* One row a format:
 *   NAME(file and function, "ggml name", ggml type, weights and bytes of a block,
 *        dwords of a block that are transposed: offset and number,
 *        a 16-bit (or 8-bit) word besides them: offset and bytes, 0 bytes: none,
 *        weights that share a scale, zero point of the codes, whether there are minima, the largest
 * code) and a file blocks/NAME.h. Block layouts: the ggml block structures, which `gguf` (PyPI)
 * dequantises. */
#ifndef LF_FORMATS_H
#define LF_FORMATS_H

#define LF_INTEGER_FORMATS(ROW)                                                                    \
    ROW(q4_0, "Q4_0", 2, 32, 18, 2, 4, 0, 2, 32, 8, 0, 15)                                         \
    ROW(q4_1, "Q4_1", 3, 32, 20, 0, 5, 0, 0, 32, 0, 1, 15)                                         \
    ROW(q5_0, "Q5_0", 6, 32, 22, 2, 5, 0, 2, 32, 16, 0, 31)                                        \
    ROW(q5_1, "Q5_1", 7, 32, 24, 0, 6, 0, 0, 32, 0, 1, 31)                                         \
    ROW(q8_0, "Q8_0", 8, 32, 34, 2, 8, 0, 2, 32, 128, 0, 255)                                      \
    ROW(q2_k, "Q2_K", 10, 256, 84, 0, 21, 0, 0, 16, 0, 1, 3)                                       \
    ROW(q3_k, "Q3_K", 11, 256, 110, 0, 27, 108, 2, 16, 4, 0, 7)                                    \
    ROW(q4_k, "Q4_K", 12, 256, 144, 0, 36, 0, 0, 32, 0, 1, 15)                                     \
    ROW(q5_k, "Q5_K", 13, 256, 176, 0, 44, 0, 0, 32, 0, 1, 31)                                     \
    ROW(q6_k, "Q6_K", 14, 256, 210, 0, 52, 208, 2, 16, 32, 0, 63)                                  \
    ROW(iq4_nl, "IQ4_NL", 20, 32, 18, 2, 4, 0, 2, 32, 128, 0, 241)                                 \
    ROW(iq4_xs, "IQ4_XS", 23, 256, 136, 0, 34, 0, 0, 32, 128, 0, 241)                              \
    ROW(mxfp4, "MXFP4", 39, 32, 17, 1, 4, 0, 1, 32, 12, 0, 24)                                     \
    ROW(tq1_0, "TQ1_0", 34, 256, 54, 0, 13, 52, 2, 32, 1, 0, 2)                                    \
    ROW(tq2_0, "TQ2_0", 35, 256, 66, 0, 16, 64, 2, 32, 1, 0, 3)                                    \
    ROW(iq1_s, "IQ1_S", 19, 256, 50, 2, 12, 0, 2, 32, 0, 1, 18)                                    \
    ROW(iq1_m, "IQ1_M", 29, 256, 56, 0, 14, 0, 0, 16, 9, 0, 18)                                    \
    ROW(iq2_xxs, "IQ2_XXS", 16, 256, 66, 2, 16, 0, 2, 32, 43, 0, 86)                               \
    ROW(iq2_xs, "IQ2_XS", 17, 256, 74, 2, 18, 0, 2, 16, 43, 0, 86)                                 \
    ROW(iq2_s, "IQ2_S", 22, 256, 82, 2, 20, 0, 2, 16, 43, 0, 86)                                   \
    ROW(iq3_xxs, "IQ3_XXS", 18, 256, 98, 2, 24, 0, 2, 32, 62, 0, 124)                              \
    ROW(iq3_s, "IQ3_S", 21, 256, 110, 2, 27, 0, 2, 32, 15, 0, 30)

#define LF_FLOAT_FORMATS(ROW)                                                                      \
    ROW(f32, "F32", 0, 4, 1)                                                                       \
    ROW(f16, "F16", 1, 2, 2)                                                                       \
    ROW(bf16, "BF16", 30, 2, 2)

/* Formats that people run for speed. One and two rows of activations are multiplied with what a
 * decoder has in registers, 20-40 % faster than through memory; of these three and four rows too,
 * for code twice as long. */
#define LF_FUSED_FORMATS(ROW)                                                                      \
    ROW(f32)                                                                                       \
    ROW(f16)                                                                                       \
    ROW(bf16) ROW(q4_0) ROW(q8_0) ROW(q4_k) ROW(q5_k) ROW(q6_k) ROW(iq4_nl) ROW(iq4_xs) ROW(mxfp4)

#endif
