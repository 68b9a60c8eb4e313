/* Half d; two high bits of 8 scales of groups of 32; their low nibbles, 4 bytes; 128 bytes: of each
 * 16, low nibbles are weights 0..15 of a group, high ones 16..31. Weight = table[nibble] * (d *
 * (scale - 32)). Symbols: lf_gemm_iq4_xs_avx2 lf_gemm_iq4_xs_avx512 lf_gemm_iq4_xs_avx512vnni. */
INLINE void decode_iq4_xs(const int MR, block b, sink *s) {
    const VI four = VI_SET32(15 << 26), two = VI_SET32((int)0xc0000000u);
    const VF d = VF_LOW_HALF(dword(b, 0));
    /* - 32 is a sign */
    const VI high = VI_XOR(dword(b, 0), VI_SET32((int)0xaaaa0000u)), low = dword(b, 1);
    UNROLL
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        nibbles_16(b, 2 + 4 * g, codes, codes + 4);
        look_up_16(IQ4_TABLE, codes);
        VI at_26 = g < 7 ? VI_SLL32(low, 26 - 4 * g) : VI_SRL32(low, 2);
        VI six = VI_OR(VI_AND(at_26, four), VI_AND(VI_SLL32(high, 14 - 2 * g), two));
        VF scale[1] = {VF_MUL(d, VF_CVT(VI_SRA32(six, 26)))};
        put_32(MR, KTK_BLOCK_iq4_xs, s, codes, scale, NULL);
    }
}
