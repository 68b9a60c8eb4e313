/* The first 16 bytes as in Q4_K; 32 bytes: bit g of byte l is the fifth of weight l of group g; 128
 * bytes: of each 32, low nibbles are one group, high ones the next. Weight = code * (d * scale) -
 * dmin * minimum. Symbols: lf_gemm_q5_k_avx2 lf_gemm_q5_k_avx512 lf_gemm_q5_k_avx512vnni. */
INLINE void decode_q5_k(const int MR, block b, sink *s) {
    const VI fifth = VI_SET8(16);
    k_scales scales = six_bit_scales(b);
    UNROLL
    for (int c = 0; c < 4; c++) {
        VI low[8], high[8];
        nibbles_16(b, 12 + 8 * c, low, high);
        nibbles_16(b, 16 + 8 * c, low + 4, high + 4);
        UNROLL
        for (int i = 0; i < 8; i++) {
            VI bits = dword(b, 4 + i);
            VI even = c < 2 ? VI_SLL16(bits, 4 - 2 * c) : c == 2 ? bits : VI_SRL16(bits, 2);
            VI odd = c < 2 ? VI_SLL16(bits, 3 - 2 * c) : VI_SRL16(bits, 2 * c - 3);
            low[i] = VI_OR(low[i], VI_AND(even, fifth));
            high[i] = VI_OR(high[i], VI_AND(odd, fifth));
        }
        put_k_group(MR, KTK_BLOCK_q5_k, s, low, &scales, 2 * c);
        put_k_group(MR, KTK_BLOCK_q5_k, s, high, &scales, 2 * c + 1);
    }
}
