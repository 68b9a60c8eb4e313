/* 64 bytes of two bits, in the order of Q2_K; half d. Weight = (code - 1) * d.
 * Symbols: lf_gemm_tq2_0_avx2 lf_gemm_tq2_0_avx512 lf_gemm_tq2_0_avx512vnni. */
INLINE void decode_tq2_0(const int MR, block b, sink *s) {
    VF scale[1] = {half_head(b)};
    for (int h = 0; h < 2; h++) {
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8];
            two_bits(b, 8 * h, quarter, codes);
            put_32(MR, KTK_BLOCK_tq2_0, s, codes, scale, NULL);
        }
    }
}
