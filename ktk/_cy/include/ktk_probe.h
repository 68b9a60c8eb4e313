/* Which vector and tile instructions this CPU and this operating system run together.
 * KTK_FEATURES is the one list of features: enum, bit order and names come from it. */
#ifndef KTK_PROBE_H
#define KTK_PROBE_H

#include <stdint.h>

/* X(enum suffix, name) in bit order. A feature stands behind the ones it needs. */
#define KTK_FEATURES(X)                                                                            \
    X(AVX2, "avx2")                                                                                \
    X(FMA, "fma")                                                                                  \
    X(F16C, "f16c")                                                                                \
    X(AVX512F, "avx512f")                                                                          \
    X(AVX512BW, "avx512bw")                                                                        \
    X(AVX512VL, "avx512vl")                                                                        \
    X(AVX512DQ, "avx512dq")                                                                        \
    X(AVX512VNNI, "avx512vnni")                                                                    \
    X(AVX512_BF16, "avx512_bf16")                                                                  \
    X(AVX512VBMI, "avx512vbmi")                                                                    \
    X(AVX_VNNI, "avx_vnni")                                                                        \
    X(AMX_TILE, "amx_tile")                                                                        \
    X(AMX_INT8, "amx_int8")                                                                        \
    X(AMX_BF16, "amx_bf16")

#define KTK_FEATURE_ENUM(suffix, name) KTK_FEATURE_##suffix,
enum ktk_feature { KTK_FEATURES(KTK_FEATURE_ENUM) KTK_NUM_FEATURES };
#undef KTK_FEATURE_ENUM

/* Bit `1 << KTK_FEATURE_x` for each feature that runs here; 0 on other architectures. Tiles count
 * if this process is given permission when it asks: not without asks_for_tiles. refused: the errno,
 * where the CPU has them and was not; else 0. */
uint64_t ktk_probe_features(int asks_for_tiles, int *refused);

/* 0 if this process may use AMX tile data, else the negated errno. Asking twice is harmless;
 * threads and children inherit the permission. */
int ktk_probe_request_tiles(void);

/* KTK_NUM_FEATURES, and their names in bit order, for callers that do not compile this header. */
int ktk_probe_num_features(void);
const char *ktk_probe_feature_name(int index); /* NULL outside 0 .. ktk_probe_num_features() - 1 */

#endif
