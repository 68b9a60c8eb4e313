/* Half d; 32 signed bytes. Weight = byte * d.
 * Symbols: lf_gemm_q8_0_avx2 lf_gemm_q8_0_avx512 lf_gemm_q8_0_avx512vnni. */
INLINE void decode_q8_0(const int MR, block b, sink *s) {
    VI codes[8];
    UNROLL
    for (int i = 0; i < 8; i++) codes[i] = VI_XOR(dword(b, i), VI_SET8((char)128));
    VF scale[1] = {half_head(b)};
    put_32(MR, KTK_BLOCK_q8_0, s, codes, scale, NULL);
}
