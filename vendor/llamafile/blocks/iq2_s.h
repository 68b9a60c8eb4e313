/* Half d; 32 bytes, the low eight bits of the grid indices; 32 bytes of signs; 8 bytes: two high
 * bits of four indices each; 8 bytes: scales of groups of 16, a nibble each. Weight = +-point * (d
 * * (scale + 1 / 2) / 4). Symbols: lf_gemm_iq2_s_avx2 lf_gemm_iq2_s_avx512
 * lf_gemm_iq2_s_avx512vnni. */
INLINE void decode_iq2_s(const int MR, block b, sink *s) {
    const VI mask = VI_SET32(0x03000300);
    const VF d = half_head(b);
    VI scales = VI_ZERO(), high = VI_ZERO();
    uint8_t at[16][64] __attribute__((aligned(64)));
    for (int g = 0; g < 8; g++) {
        high = g % 4 ? VI_SRL32(high, 8) : dword(b, 16 + g / 4);
        word_indices(dword(b, g), at + 2 * g, mask, VI_SLL32(high, 8), VI_SLL32(high, 20),
                     VI_SLL32(high, 6), VI_SLL32(high, 18));
    }
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        UNROLL
        for (int l = 0; l < 4; l++)
            grid_8(lf_grid_iq2_s, at[2 * g + l % 2] + 2 * (l / 2), 2, codes + 2 * l);
        negate_where(codes, dword(b, 8 + g), 2 * 43);
        scales = g % 4 ? VI_SRL32(scales, 8) : dword(b, 18 + g / 4);
        VF scale[2] = {VF_MUL(d, quarter_scale(scales, 0)), VF_MUL(d, quarter_scale(scales, 1))};
        put_32(MR, KTK_BLOCK_iq2_s, s, codes, scale, NULL);
    }
}
