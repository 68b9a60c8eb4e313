/* Half d; 16 bytes: low nibbles are weights 0..15, high ones 16..31. Weight = (nibble - 8) * d.
 * Symbols: lf_gemm_q4_0_avx2 lf_gemm_q4_0_avx512 lf_gemm_q4_0_avx512vnni. */
INLINE void decode_q4_0(const int MR, block b, sink *s) {
    VI codes[8];
    nibbles_16(b, 0, codes, codes + 4);
    VF scale[1] = {half_head(b)};
    put_32(MR, KTK_BLOCK_q4_0, s, codes, scale, NULL);
}
