/* 16 bytes: low nibble scale, high nibble minimum of a group of 16; 64 bytes: of each 32, bits 0-1
 * of byte l are weight l, bits 2-3 weight 32 + l, 4-5 64 + l, 6-7 96 + l; halves d, dmin. Weight =
 * code * (d * scale) - dmin * minimum. Symbols: lf_gemm_q2_k_avx2 lf_gemm_q2_k_avx512
 * lf_gemm_q2_k_avx512vnni. */
INLINE void decode_q2_k(const int MR, block b, sink *s) {
    const VI nibble = VI_SET8(15);
    const VF d = VF_LOW_HALF(dword(b, 20)), minus_dmin = negative(high_half(dword(b, 20)));
    for (int h = 0; h < 2; h++) {
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8], both = dword(b, 2 * h + quarter / 2);
            VI scales = VI_AND(both, nibble), minima = VI_AND(VI_SRL16(both, 4), nibble);
            VF scale[2], minimum[2];
            two_bits(b, 4 + 8 * h, quarter, codes);
            UNROLL
            for (int g = 0; g < 2; g++) {
                scale[g] = VF_MUL(d, unsigned_byte(scales, 2 * (quarter % 2) + g));
                minimum[g] = VF_MUL(minus_dmin, unsigned_byte(minima, 2 * (quarter % 2) + g));
            }
            put_32(MR, KTK_BLOCK_q2_k, s, codes, scale, minimum);
        }
    }
}
