/* Rows begin with fp32 d. Eight 32-bit words, one a group of 32: bit 0, its states begin 32768
 * later; 7 bits of scale; bits 12..14 of eight states; 64 bytes: low eight bits of 64 states, of
 * four weights each; 32 bytes: low nibbles are bits 8..11 of the first 32, high ones of the
 * others. Weight = (trellis - 126) * (d * (scale - 64)). Symbols: lf_gemm_iq4_kt_avx2
 * lf_gemm_iq4_kt_avx512 lf_gemm_iq4_kt_avx512vnni. */
INLINE void decode_iq4_kt(const int MR, block b, sink *s) {
    for (int g = 0; g < 8; g++) {
        VI codes[8], word = dword(b, g);
        const VI offset = VI_SLL32(VI_AND(word, VI_SET32(1)), 15);
        UNROLL
        for (int i = 0; i < 8; i++) {
            VI low = dword(b, 8 + 2 * g + i / 4), high = dword(b, 24 + (2 * g + i / 4) % 8);
            if (g >= 4) high = VI_SRL32(high, 4);
            VI index = VI_OR(VI_AND(VI_SRL32(low, i % 4 * 8), VI_SET32(0xff)),
                             VI_AND(VI_SLL32(VI_SRL32(high, i % 4 * 8), 8), VI_SET32(0xf00)));
            VI top = VI_SLL32(VI_AND(VI_SRL32(word, 8 + 3 * i), VI_SET32(7)), 12);
            VI state = VI_ADD32(first_state(VI_OR(index, top)), offset);
            codes[i] = next_four(&state);
        }
        VI seven = VI_AND(VI_SRL32(word, 1), VI_SET32(127));
        VF scale[1] = {VF_MUL(b.row_scale, VF_CVT(VI_SUB32(seven, VI_SET32(64))))};
        put_32(MR, KTK_BLOCK_iq4_kt, s, codes, scale, NULL);
    }
}
