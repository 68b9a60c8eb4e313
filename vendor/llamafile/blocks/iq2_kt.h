/* Rows begin with fp32 d. 4 bytes: low nibbles, the scales of groups of 32 0..3, high ones 4..7;
 * 32 states, 16 bits each, of eight weights each. Weight = (trellis - 126) * (d * table[scale]).
 * Symbols: lf_gemm_iq2_kt_avx2 lf_gemm_iq2_kt_avx512 lf_gemm_iq2_kt_avx512vnni. */
INLINE void decode_iq2_kt(const int MR, block b, sink *s) {
    VI scales = VI_ZERO();
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
        VF scale[1] = {VF_MUL(b.row_scale, four_bit_scale(scales, 0))};
        put_32(MR, KTK_BLOCK_iq2_kt, s, codes, scale, NULL);
    }
}
