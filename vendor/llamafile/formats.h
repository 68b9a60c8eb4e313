/* One row a format:
 *   NAME(file and function, "ggml name", ggml type, weights and bytes of a block,
 *        dwords of a block that are transposed: offset and number,
 *        a 16-bit (or 8-bit) word besides them: offset and bytes, 0 bytes: none,
 *        weights that share a scale, zero point of the codes, whether there are minima, the largest code)
 * and a file blocks/NAME.h. Block layouts: the ggml block structures, which `gguf` (PyPI) dequantises. */
#define LF_INTEGER_FORMATS(ROW)                                                                              \
    ROW(q4_0, "Q4_0", 2, 32, 18, 2, 4, 0, 2, 32, 8, 0, 15)                                                   \
    ROW(q8_0, "Q8_0", 8, 32, 34, 2, 8, 0, 2, 32, 128, 0, 255)                                                \
    ROW(q4_k, "Q4_K", 12, 256, 144, 0, 36, 0, 0, 32, 0, 1, 15)                                               \
    ROW(q6_k, "Q6_K", 14, 256, 210, 0, 52, 208, 2, 16, 32, 0, 63)

#define LF_FLOAT_FORMATS(ROW)                                                                                \
    ROW(f32, "F32", 0, 4, 1)                                                                                 \
    ROW(f16, "F16", 1, 2, 2)                                                                                 \
    ROW(bf16, "BF16", 30, 2, 2)
