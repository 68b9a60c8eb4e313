/* Rows begin with half d. 8 bits: the fifth of eight scales; 8 bits, one a group of 32: its
 * values are larger by 4; 4 bytes: low nibbles of scales 0..3, high ones 4..7; then codes as in
 * IQ3_K. Weight = table[code] * (d * (scale - 16)). Symbols: lf_gemm_iq3_ks_avx2
 * lf_gemm_iq3_ks_avx512 lf_gemm_iq3_ks_avx512vnni. */
INLINE void decode_iq3_ks(const int MR, block b, sink *s) {
    const VI third = VI_SET8(4);
    VI extra = VI_XOR(VI_U16(b.heads), VI_SET32(0x00ff)), low = dword(b, 0), high[8];
    for (int h = 0; h < 2; h++) {
        UNROLL
        for (int i = 0; i < 8; i++) high[i] = h ? VI_SRL16(high[i], 4) : dword(b, 17 + i);
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8];
            two_bits(b, 1 + 8 * h, quarter, codes);
            UNROLL
            for (int i = 0; i < 8; i++) {
                VI bits = quarter < 3 ? VI_SLL16(high[i], 2 - quarter) : VI_SRL16(high[i], 1);
                codes[i] = VI_OR(codes[i], VI_AND(bits, third));
            }
            look_up_16(THREE_BIT_TABLE, codes);
            add_to(8, codes, shift_where(extra, 8 + quarter, 4));
            VF scale[1] = {VF_MUL(b.row_scale, signed_five(low, 8 * quarter, extra, quarter))};
            put_32(MR, KTK_BLOCK_iq3_ks, s, codes, scale, NULL);
        }
        extra = VI_SRL32(extra, 4);
        low = VI_SRL32(low, 4);
    }
}
