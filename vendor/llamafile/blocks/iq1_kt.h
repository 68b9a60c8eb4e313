/* Rows begin with fp32 d. 8 bytes, one a group of 32: low nibble, the scale; high bits, the
 * thirteenth of four states; 32 bytes: low eight bits of 32 states, of eight weights each; 16
 * bytes: low nibbles are bits 8..11 of the first 16, high ones of the others. Weight = (trellis
 * - 126) * (d * table[scale]). Symbols: lf_gemm_iq1_kt_avx2 lf_gemm_iq1_kt_avx512
 * lf_gemm_iq1_kt_avx512vnni. */
INLINE void decode_iq1_kt(const int MR, block b, sink *s) {
    VI scales = VI_ZERO();
    for (int g = 0; g < 8; g++) {
        VI codes[8], low = dword(b, 2 + g), high = dword(b, 10 + g % 4);
        scales = g % 4 ? VI_SRL32(scales, 8) : dword(b, g / 4);
        if (g >= 4) high = VI_SRL32(high, 4);
        UNROLL
        for (int i = 0; i < 4; i++) {
            VI index = VI_OR(VI_AND(VI_SRL32(low, 8 * i), VI_SET32(0xff)),
                             VI_AND(VI_SLL32(VI_SRL32(high, 8 * i), 8), VI_SET32(0xf00)));
            VI top = VI_AND(VI_SLL32(scales, 8 - i), VI_SET32(0x1000));
            VI state = first_state(VI_OR(index, top));
            codes[2 * i] = next_four(&state);
            codes[2 * i + 1] = next_four(&state);
        }
        VF scale[1] = {VF_MUL(b.row_scale, four_bit_scale(scales, 0))};
        put_32(MR, KTK_BLOCK_iq1_kt, s, codes, scale, NULL);
    }
}
