/* The first 68 bytes as in IQ2_KT; 32 bytes: bit g of byte l is the sign of weight l of 32
 * weights g. Weight = +-|trellis - 126| * (d * scale). Symbols: lf_gemm_iq3_kt_avx2
 * lf_gemm_iq3_kt_avx512 lf_gemm_iq3_kt_avx512vnni. */
INLINE void decode_iq3_kt(const int MR, block b, sink *s) {
    const VI twice_zero = VI_SET8((char)252);
    VI scales = VI_ZERO(), negative_ones = VI_SET8(1);
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        scales = g % 4 ? VI_SRL32(scales, 8) : g ? VI_SRL32(dword(b, 0), 4) : dword(b, 0);
        UNROLL
        for (int i = 0; i < 4; i++) {
            VI both = dword(b, 1 + 2 * g + i / 2);
            VI state = first_state(i % 2 ? VI_SRL32(both, 16) : VI_AND(both, VI_SET32(0xffff)));
            codes[2 * i] = next_four(&state);
            codes[2 * i + 1] = next_four(&state);
        }
        UNROLL
        for (int i = 0; i < 8; i++) {
            VI least = VI_MIN_U8(codes[i], VI_SUB8(twice_zero, codes[i]));
            codes[i] =
                VI_WHERE_BIT(dword(b, 17 + i), negative_ones, least, VI_SUB8(twice_zero, least));
        }
        negative_ones = VI_ADD8(negative_ones, negative_ones);
        VF scale[1] = {VF_MUL(b.row_scale, low_nibble(scales, 0))};
        put_32(MR, KTK_BLOCK_iq3_kt, s, codes, scale, NULL);
    }
}
