/* Half d; 16 bytes: low nibbles are weights 0..15, high ones 16..31. Weight = table[nibble] * d.
 * Symbols: lf_gemm_iq4_nl_avx2 lf_gemm_iq4_nl_avx512 lf_gemm_iq4_nl_avx512vnni. */
INLINE void decode_iq4_nl(const int MR, block b, sink *s) {
    VI codes[8];
    nibbles_16(b, 0, codes, codes + 4);
    look_up_16(IQ4_TABLE, codes);
    VF scale[1] = {half_head(b)};
    put_32(MR, KTK_BLOCK_iq4_nl, s, codes, scale, NULL);
}
