/* 32 bytes: bit g of byte l is the third of weight l of 32 weights g; 64 bytes of two low bits, as
 * in Q2_K; 12 bytes: 16 scales of groups of 16, low nibbles in the nibbles of the first eight, two
 * high bits each in the last four; half d. Weight = (code - 4) * (d * (scale - 32)). Symbols:
 * lf_gemm_q3_k_avx2 lf_gemm_q3_k_avx512 lf_gemm_q3_k_avx512vnni. */
INLINE void decode_q3_k(const int MR, block b, sink *s) {
    const VI third = VI_SET8(4), nibble = VI_SET8(15), high = VI_SET8(48), sign = VI_SET8(32);
    const VF d = half_head(b);
    const VI top = dword(b, 26);
    UNROLL
    for (int c = 0; c < 8; c++) {
        VI codes[8];
        two_bits(b, 8 + c / 4 * 8, c % 4, codes);
        UNROLL
        for (int i = 0; i < 8; i++) {
            VI bits = dword(b, i);
            bits = c < 2 ? VI_SLL16(bits, 2 - c) : c == 2 ? bits : VI_SRL16(bits, c - 2);
            codes[i] = VI_OR(codes[i], VI_AND(bits, third));
        }
        /* Scales 4 * (c / 2) .. + 3, this group's the first or last two. */
        VI low = dword(b, 24 + c / 2 % 2), two = c < 4 ? VI_SLL16(top, c < 2 ? 4 : 2) : top;
        if (c >= 4) low = VI_SRL16(low, 4);
        if (c >= 6) two = VI_SRL16(top, 2);
        VI scales = VI_XOR(VI_OR(VI_AND(low, nibble), VI_AND(two, high)), sign);
        VF scale[2] = {VF_MUL(d, signed_six_bits(scales, 2 * (c % 2))),
                       VF_MUL(d, signed_six_bits(scales, 2 * (c % 2) + 1))};
        put_32(MR, KTK_BLOCK_q3_k, s, codes, scale, NULL);
    }
}
