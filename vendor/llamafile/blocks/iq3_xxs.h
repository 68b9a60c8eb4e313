/* Half d; 64 bytes, a grid index for four weights each; for each 32 weights a dword: four times
 * seven bits of sign, four of scale. Weight = +-point * (d * (scale + 1 / 2) / 2). Symbols:
 * lf_gemm_iq3_xxs_avx2 lf_gemm_iq3_xxs_avx512 lf_gemm_iq3_xxs_avx512vnni. */
INLINE void decode_iq3_xxs(const int MR, block b, sink *s) {
    const VF d = half_head(b);
    for (int g = 0; g < 8; g++) {
        const VI rest = dword(b, 16 + g), signs = seven_bit_signs(rest);
        VI codes[8];
        UNROLL
        for (int i = 0; i < 8; i++)
            codes[i] = grid_4(lf_grid_iq3_xxs, b.dwords + 128 * g + 64 * (i / 4) + i % 4, 1);
        negate_where(codes, signs, 2 * 62);
        VF scale[1] = {VF_MUL(d, VF_FMA(VF_CVT(VI_SRL32(rest, 28)), VF_SET(0.5f), VF_SET(0.25f)))};
        put_32(MR, KTK_BLOCK_iq3_xxs, s, codes, scale, NULL);
    }
}
