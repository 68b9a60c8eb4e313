/* Half d; 32 bits, the fifth of each weight; 16 bytes: low nibbles are weights 0..15, high
 * ones 16..31. Weight = (code - 16) * d. Symbols: lf_gemm_q5_0_avx2 lf_gemm_q5_0_avx512
 * lf_gemm_q5_0_avx512vnni. */
INLINE void decode_q5_0(const int MR, block b, sink *s) {
    VI codes[8];
    nibbles_16(b, 1, codes, codes + 4);
    add_16_where_bits(codes, dword(b, 0));
    VF scale[1] = {half_head(b)};
    put_32(MR, KTK_BLOCK_q5_0, s, codes, scale, NULL);
}
