/* 52 bytes of ternary fractions; half d. Digit n of a byte is the integer part of three times the
 * fraction byte * 3 ** n / 256. Digit n of bytes 0..31 are weights 32 * n .., of bytes 32..47
 * weights 160 + 16 * n .., n = 0..4, and of the last four weights 240 + 4 * n .., n = 0..3. Weight
 * = (digit - 1) * d. Symbols: lf_gemm_tq1_0_avx2 lf_gemm_tq1_0_avx512 lf_gemm_tq1_0_avx512vnni. */
INLINE void decode_tq1_0(const int MR, block b, sink *s) {
    VF scale[1] = {half_head(b)};
    VI x[8], codes[8];
    UNROLL
    for (int i = 0; i < 8; i++) x[i] = dword(b, i);
    for (int n = 0; n < 5; n++) {
        UNROLL
        for (int i = 0; i < 8; i++) codes[i] = ternary_digit(&x[i]);
        put_32(MR, KTK_BLOCK_tq1_0, s, codes, scale, NULL);
    }
    UNROLL
    for (int i = 0; i < 4; i++) x[i] = dword(b, 8 + i);
    for (int n = 0; n < 2; n++) {
        UNROLL
        for (int i = 0; i < 8; i++) codes[i] = ternary_digit(&x[i % 4]);
        put_32(MR, KTK_BLOCK_tq1_0, s, codes, scale, NULL);
    }
    x[4] = dword(b, 12);
    UNROLL
    for (int i = 0; i < 8; i++) codes[i] = ternary_digit(&x[i < 4 ? i : 4]);
    put_32(MR, KTK_BLOCK_tq1_0, s, codes, scale, NULL);
}
