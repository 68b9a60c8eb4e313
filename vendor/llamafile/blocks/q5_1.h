/* Halves d, m; 32 bits, the fifth of each weight; 16 bytes: low nibbles are weights 0..15, high
 * ones 16..31. Weight = code * d + m. Symbols: lf_gemm_q5_1_avx2 lf_gemm_q5_1_avx512
 * lf_gemm_q5_1_avx512vnni. */
INLINE void decode_q5_1(const int MR, block b, sink *s) {
    VI codes[8];
    nibbles_16(b, 2, codes, codes + 4);
    add_16_where_bits(codes, dword(b, 1));
    VF scale[1] = {VF_LOW_HALF(dword(b, 0))}, minimum[1] = {high_half(dword(b, 0))};
    put_32(MR, KTK_BLOCK_q5_1, s, codes, scale, minimum);
}
