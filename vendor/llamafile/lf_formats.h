/* One row a format:
 *   NAME(file and function, "ggml name", ggml type, weights and bytes of a block,
 *        dwords of a block that are transposed: offset and number,
 *        a 16-bit (or 8-bit) word besides them: offset and bytes, 0 bytes: none,
 *        weights that share a scale, zero point of the codes, whether there are minima, the largest
 * code, bytes of a scale before a row's blocks: 4 fp32, 2 fp16, 0: none) and a file blocks/NAME.h.
 * Block layouts: the ggml block structures, which `gguf` (PyPI) dequantises, and those of
 * ik_llama.cpp, which ktk/experts/formats/ik_decode.py does. */
#ifndef LF_FORMATS_H
#define LF_FORMATS_H

#define LF_INTEGER_FORMATS(ROW)                                                                    \
    ROW(q4_0, "Q4_0", 2, 32, 18, 2, 4, 0, 2, 32, 8, 0, 15, 0)                                      \
    ROW(q4_1, "Q4_1", 3, 32, 20, 0, 5, 0, 0, 32, 0, 1, 15, 0)                                      \
    ROW(q5_0, "Q5_0", 6, 32, 22, 2, 5, 0, 2, 32, 16, 0, 31, 0)                                     \
    ROW(q5_1, "Q5_1", 7, 32, 24, 0, 6, 0, 0, 32, 0, 1, 31, 0)                                      \
    ROW(q8_0, "Q8_0", 8, 32, 34, 2, 8, 0, 2, 32, 128, 0, 255, 0)                                   \
    ROW(q2_k, "Q2_K", 10, 256, 84, 0, 21, 0, 0, 16, 0, 1, 3, 0)                                    \
    ROW(q3_k, "Q3_K", 11, 256, 110, 0, 27, 108, 2, 16, 4, 0, 7, 0)                                 \
    ROW(q4_k, "Q4_K", 12, 256, 144, 0, 36, 0, 0, 32, 0, 1, 15, 0)                                  \
    ROW(q5_k, "Q5_K", 13, 256, 176, 0, 44, 0, 0, 32, 0, 1, 31, 0)                                  \
    ROW(q6_k, "Q6_K", 14, 256, 210, 0, 52, 208, 2, 16, 32, 0, 63, 0)                               \
    ROW(iq4_nl, "IQ4_NL", 20, 32, 18, 2, 4, 0, 2, 32, 128, 0, 241, 0)                              \
    ROW(iq4_xs, "IQ4_XS", 23, 256, 136, 0, 34, 0, 0, 32, 128, 0, 241, 0)                           \
    ROW(mxfp4, "MXFP4", 39, 32, 17, 1, 4, 0, 1, 32, 12, 0, 24, 0)                                  \
    ROW(tq1_0, "TQ1_0", 34, 256, 54, 0, 13, 52, 2, 32, 1, 0, 2, 0)                                 \
    ROW(tq2_0, "TQ2_0", 35, 256, 66, 0, 16, 64, 2, 32, 1, 0, 3, 0)                                 \
    ROW(iq1_s, "IQ1_S", 19, 256, 50, 2, 12, 0, 2, 32, 0, 1, 18, 0)                                 \
    ROW(iq1_m, "IQ1_M", 29, 256, 56, 0, 14, 0, 0, 16, 9, 0, 18, 0)                                 \
    ROW(iq2_xxs, "IQ2_XXS", 16, 256, 66, 2, 16, 0, 2, 32, 43, 0, 86, 0)                            \
    ROW(iq2_xs, "IQ2_XS", 17, 256, 74, 2, 18, 0, 2, 16, 43, 0, 86, 0)                              \
    ROW(iq2_s, "IQ2_S", 22, 256, 82, 2, 20, 0, 2, 16, 43, 0, 86, 0)                                \
    ROW(iq3_xxs, "IQ3_XXS", 18, 256, 98, 2, 24, 0, 2, 32, 62, 0, 124, 0)                           \
    ROW(iq3_s, "IQ3_S", 21, 256, 110, 2, 27, 0, 2, 32, 15, 0, 30, 0)                               \
    ROW(iq2_k, "IQ2_K", 137, 256, 76, 0, 19, 0, 0, 16, 31, 0, 53, 0)                               \
    ROW(iq3_k, "IQ3_K", 138, 256, 110, 2, 27, 0, 2, 16, 63, 0, 114, 0)                             \
    ROW(iq4_k, "IQ4_K", 139, 256, 144, 0, 36, 0, 0, 16, 128, 0, 245, 0)                            \
    ROW(iq5_k, "IQ5_K", 140, 256, 176, 0, 44, 0, 0, 16, 128, 0, 251, 0)                            \
    ROW(iq6_k, "IQ6_K", 141, 256, 212, 0, 53, 0, 0, 16, 128, 0, 250, 0)                            \
    ROW(iq2_ks, "IQ2_KS", 145, 256, 70, 2, 17, 0, 2, 32, 31, 0, 53, 2)                             \
    ROW(iq3_ks, "IQ3_KS", 156, 256, 102, 2, 25, 0, 2, 32, 63, 0, 114, 2)                           \
    ROW(iq4_ks, "IQ4_KS", 144, 256, 136, 0, 34, 0, 0, 32, 128, 0, 245, 4)                          \
    ROW(iq5_ks, "IQ5_KS", 152, 256, 168, 0, 42, 0, 0, 32, 128, 0, 251, 4)                          \
    ROW(iq4_kss, "IQ4_KSS", 146, 256, 128, 0, 32, 0, 0, 32, 128, 0, 245, 4)                        \
    ROW(iq2_kl, "IQ2_KL", 157, 256, 86, 2, 21, 0, 2, 32, 63, 0, 110, 2)                            \
    ROW(iq1_kt, "IQ1_KT", 158, 256, 56, 0, 14, 0, 0, 32, 126, 0, 252, 4)                           \
    ROW(iq2_kt, "IQ2_KT", 153, 256, 68, 0, 17, 0, 0, 32, 126, 0, 252, 4)                           \
    ROW(iq3_kt, "IQ3_KT", 154, 256, 100, 0, 25, 0, 0, 32, 126, 0, 252, 4)                          \
    ROW(iq4_kt, "IQ4_KT", 155, 256, 128, 0, 32, 0, 0, 32, 126, 0, 252, 4)

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
