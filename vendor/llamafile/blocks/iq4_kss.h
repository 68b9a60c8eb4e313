/* Rows begin with fp32 d. Of each eight 16-bit words the lowest bits make up a group's scale as
 * in IQ4_KS; the others, x ^ (x >> 1), are 16 bytes of nibbles as in IQ4_K. Weight =
 * table[nibble] * (d * (scale - 127)), scale being even. Symbols: lf_gemm_iq4_kss_avx2
 * lf_gemm_iq4_kss_avx512 lf_gemm_iq4_kss_avx512vnni. */
INLINE void decode_iq4_kss(const int MR, block b, sink *s) {
    const VI bits = VI_SET32((int)0xfffefffeu), nibble = VI_SET8(15);
    for (int g = 0; g < 8; g++) {
        VI codes[8], scales = VI_ZERO();
        UNROLL
        for (int i = 0; i < 4; i++) {
            VI x = dword(b, 4 * g + i), lowest = VI_ANDNOT(bits, x);
            lowest = VI_OR(VI_SLL32(lowest, 2 * i), VI_SRL32(lowest, 15 - 2 * i));
            scales = VI_OR(scales, lowest);
            x = VI_AND(x, bits);
            x = VI_XOR(x, VI_SRL16(x, 1));
            codes[i] = VI_AND(x, nibble);
            codes[i + 4] = VI_AND(VI_SRL16(x, 4), nibble);
        }
        look_up_16(IQ4_TABLE, codes);
        add_to(8, codes, shift_where(scales, 0, 4));
        VF scale[1] = {VF_MUL(b.row_scale, seven_bit_scale(scales))};
        put_32(MR, KTK_BLOCK_iq4_kss, s, codes, scale, NULL);
    }
}
