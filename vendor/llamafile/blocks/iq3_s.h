/* Half d; 64 bytes, the low eight bits of grid indices for four weights each; 8 bytes: the ninth of
 * eight indices each; 32 bytes of signs; 4 bytes: scales of groups of 32, a nibble each. Weight =
 * +-point * (d * (2 * scale + 1)). Symbols: lf_gemm_iq3_s_avx2 lf_gemm_iq3_s_avx512
 * lf_gemm_iq3_s_avx512vnni. */
INLINE void decode_iq3_s(const int MR, block b, sink *s) {
    const VI mask = VI_SET32(0x01000100);
    const VF d = half_head(b);
    VI scales = dword(b, 26), high = VI_ZERO();
    uint8_t at[32][64] __attribute__((aligned(64)));
    for (int g = 0; g < 8; g++) {
        high = g % 4 ? VI_SRL32(high, 8) : dword(b, 16 + g / 4);
        word_indices(dword(b, 2 * g), at + 4 * g, mask, VI_SLL32(high, 8), VI_SLL32(high, 22),
                     VI_SLL32(high, 7), VI_SLL32(high, 21));
        word_indices(dword(b, 2 * g + 1), at + 4 * g + 2, mask, VI_SLL32(high, 4),
                     VI_SLL32(high, 18), VI_SLL32(high, 3), VI_SLL32(high, 17));
    }
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        UNROLL
        for (int i = 0; i < 8; i++)
            codes[i] = grid_4(lf_grid_iq3_s, at[4 * g + i / 4 * 2 + i % 2] + i % 4 / 2 * 2, 2);
        negate_where(codes, dword(b, 18 + g), 2 * 15);
        VF scale[1] = {
            VF_MUL(d, VF_FMA(VF_CVT(VI_AND(scales, VI_SET32(15))), VF_SET(2.0f), VF_SET(1.0f)))};
        scales = VI_SRL32(scales, 4);
        put_32(MR, KTK_BLOCK_iq3_s, s, codes, scale, NULL);
    }
}
