/* Rows begin with half d. 16 bits: two high bits of eight scales; 4 bytes: low nibbles of scales
 * 0..3, high ones 4..7; 64 bytes: of each 16, low nibbles are 16 pairs of weights, high ones the
 * next 16; 16 bytes: bit g of byte l is the fifth of pair l of 32 weights g. Weight =
 * table[code], first or second, * (d * (scale - 32)). Symbols: lf_gemm_iq2_kl_avx2
 * lf_gemm_iq2_kl_avx512 lf_gemm_iq2_kl_avx512vnni. */
INLINE void decode_iq2_kl(const int MR, block b, sink *s) {
    static const uint8_t EVEN[16] = {0, 128, 1, 128, 4,  128, 5,  128,
                                     8, 128, 9, 128, 12, 128, 13, 128},
                         ODD[16] = {128, 0, 128, 1, 128, 4,  128, 5,
                                    128, 8, 128, 9, 128, 12, 128, 13};
    const VI even = VI_LOAD_TABLE(EVEN), odd = VI_LOAD_TABLE(ODD);
    VI high = VI_XOR(VI_U16(b.heads), VI_SET32(0xaaaa)), low = VI_ZERO(), fifth[4];
    for (int c = 0; c < 4; c++) {
        VI nibbles[2][4];
        low = c % 2 ? VI_SRL32(low, 16) : c ? VI_SRL32(dword(b, 0), 4) : dword(b, 0);
        nibbles_16(b, 1 + 4 * c, nibbles[0], nibbles[1]);
        UNROLL
        for (int i = 0; i < 4; i++) fifth[i] = c ? VI_SRL16(fifth[i], 2) : dword(b, 17 + i);
        UNROLL
        for (int g = 0; g < 2; g++) {
            VI codes[8];
            UNROLL
            for (int i = 0; i < 4; i++) {
                VI first = look_up_32(FIRST_TABLE, nibbles[g][i], fifth[i], VI_SET8(g + 1));
                VI second = look_up_32(SECOND_TABLE, nibbles[g][i], fifth[i], VI_SET8(g + 1));
                codes[2 * i] = VI_OR(VI_SHUFFLE8(first, even), VI_SHUFFLE8(second, odd));
                codes[2 * i + 1] = VI_OR(VI_SHUFFLE8(VI_SRL32(first, 16), even),
                                         VI_SHUFFLE8(VI_SRL32(second, 16), odd));
            }
            VF scale[1] = {VF_MUL(b.row_scale, signed_six(low, 8 * g, high, 2 * g))};
            put_32(MR, KTK_BLOCK_iq2_kl, s, codes, scale, NULL);
        }
        high = VI_SRL32(high, 4);
    }
}
