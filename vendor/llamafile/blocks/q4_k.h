/* Halves d, dmin; 12 bytes: scale and minimum of 8 groups of 32, 6 bits each; 128 bytes: of each
 * 32, low nibbles are one group, high ones the next. Weight = nibble * (d * scale) - dmin *
 * minimum. Symbols: lf_gemm_q4_k_avx2 lf_gemm_q4_k_avx512 lf_gemm_q4_k_avx512vnni. */
INLINE void decode_q4_k(const int MR, block b, sink *s) {
    k_scales scales = six_bit_scales(b);
    UNROLL
    for (int c = 0; c < 4; c++) {
        VI low[8], high[8];
        nibbles_16(b, 4 + 8 * c, low, high);
        nibbles_16(b, 8 + 8 * c, low + 4, high + 4);
        put_k_group(MR, KTK_BLOCK_q4_k, s, low, &scales, 2 * c);
        put_k_group(MR, KTK_BLOCK_q4_k, s, high, &scales, 2 * c + 1);
    }
}
