/* Half d; 32 bytes, the low eight bits of the grid indices; 8 words, one for 32 weights: three high
 * bits of four indices, three of scale, the sign of delta = 1 / 8. Weight = (point + delta) * (d *
 * (2 * scale + 1)); codes are 8 * point + 10. Symbols: lf_gemm_iq1_s_avx2 lf_gemm_iq1_s_avx512
 * lf_gemm_iq1_s_avx512vnni. */
INLINE void decode_iq1_s(const int MR, block b, sink *s) {
    const VI mask = VI_SET32(0x07000700);
    const VF d = VF_MUL(half_head(b), VF_SET(0.125f));
    VI rest = VI_ZERO();
    uint8_t at[16][64] __attribute__((aligned(64)));
    for (int g = 0; g < 8; g++) {
        rest = g % 2 ? VI_SRL32(rest, 16) : dword(b, 8 + g / 2);
        word_indices(dword(b, g), at + 2 * g, mask, VI_SLL32(rest, 8), VI_SLL32(rest, 18),
                     VI_SLL32(rest, 5), VI_SLL32(rest, 15));
    }
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        UNROLL
        for (int l = 0; l < 4; l++)
            grid_8(lf_grid_iq1, at[2 * g + l % 2] + 2 * (l / 2), 2, codes + 2 * l);
        rest = g % 2 ? VI_SRL32(rest, 16) : dword(b, 8 + g / 2);
        VF scale[1] = {VF_MUL(d, odd_scale(rest, 12))};
        VF delta = VF_CVT(VI_SRA32(VI_SLL32(rest, 16), 31)); /* 0 or -1 */
        VF minimum[1] = {VF_MUL(scale[0], VF_FMA(delta, VF_SET(2.0f), VF_SET(-9.0f)))};
        put_32(MR, KTK_BLOCK_iq1_s, s, codes, scale, minimum);
    }
}
