/* Halves d, m; 16 bytes: low nibbles are weights 0..15, high ones 16..31. Weight = nibble * d + m.
 * Symbols: lf_gemm_q4_1_avx2 lf_gemm_q4_1_avx512 lf_gemm_q4_1_avx512vnni. */
INLINE void decode_q4_1(const int MR, block b, sink *s) {
    VI codes[8];
    nibbles_16(b, 1, codes, codes + 4);
    VF scale[1] = {VF_LOW_HALF(dword(b, 0))}, minimum[1] = {high_half(dword(b, 0))};
    put_32(MR, KTK_BLOCK_q4_1, s, codes, scale, minimum);
}
