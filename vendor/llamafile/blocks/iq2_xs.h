/* Half d; 32 words, nine bits of grid index and seven of sign; 8 bytes: scales of groups of 16, a
 * nibble each. Weight = +-point * (d * (scale + 1 / 2) / 4). Symbols: lf_gemm_iq2_xs_avx2
 * lf_gemm_iq2_xs_avx512 lf_gemm_iq2_xs_avx512vnni. */
INLINE void decode_iq2_xs(const int MR, block b, sink *s) {
    const VI mask = VI_SET32(0x01ff01ff), low = VI_SET32(0x007f007f), high = VI_SET32(0x7f007f00);
    const VF d = half_head(b);
    VI scales = VI_ZERO();
    uint8_t at[16][64] __attribute__((aligned(64)));
    for (int i = 0; i < 16; i++) VI_STORE(at[i], VI_AND(dword(b, i), mask));
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        UNROLL
        for (int l = 0; l < 4; l++)
            grid_8(lf_grid_iq2_xs, at[2 * g + l / 2] + 2 * (l % 2), 2, codes + 2 * l);
        VI even = VI_AND(VI_SRL16(dword(b, 2 * g), 9), low),
           odd = VI_AND(VI_SRL16(dword(b, 2 * g + 1), 1), high);
        negate_where(codes, swap_middle_bytes(with_parity(VI_OR(even, odd))), 2 * 43);
        scales = g % 4 ? VI_SRL32(scales, 8) : dword(b, 16 + g / 4);
        VF scale[2] = {VF_MUL(d, quarter_scale(scales, 0)), VF_MUL(d, quarter_scale(scales, 1))};
        put_32(MR, KTK_BLOCK_iq2_xs, s, codes, scale, NULL);
    }
}
