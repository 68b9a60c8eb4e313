/* Half d; for each 32 weights four grid indices of a byte and a dword: four times seven bits of
 * sign, four of scale. Weight = +-point * (d * (scale + 1 / 2) / 4). Symbols: lf_gemm_iq2_xxs_avx2
 * lf_gemm_iq2_xxs_avx512 lf_gemm_iq2_xxs_avx512vnni. */
INLINE void decode_iq2_xxs(const int MR, block b, sink *s) {
    const VF d = half_head(b);
    for (int g = 0; g < 8; g++) {
        const VI rest = dword(b, 2 * g + 1), signs = seven_bit_signs(rest);
        VI codes[8];
        UNROLL
        for (int l = 0; l < 4; l++)
            grid_8(lf_grid_iq2_xxs, b.dwords + 128 * g + l, 1, codes + 2 * l);
        negate_where(codes, signs, 2 * 43);
        VF scale[1] = {
            VF_MUL(d, VF_FMA(VF_CVT(VI_SRL32(rest, 28)), VF_SET(0.25f), VF_SET(0.125f)))};
        put_32(MR, KTK_BLOCK_iq2_xxs, s, codes, scale, NULL);
    }
}
