/* Rows begin with half d. 8 bits, one a group of 32: its values are larger by 5; 8 bits: the
 * fifth of eight scales; 4 bytes: their low nibbles; 64 bytes of codes as in Q2_K. Weight =
 * table[code] * (d * (scale - 16)). Symbols: lf_gemm_iq2_ks_avx2 lf_gemm_iq2_ks_avx512
 * lf_gemm_iq2_ks_avx512vnni. */
INLINE void decode_iq2_ks(const int MR, block b, sink *s) {
    VI extra = VI_XOR(VI_U16(b.heads), VI_SET32(0xff00)), low = dword(b, 0);
    for (int h = 0; h < 2; h++) {
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8];
            two_bits(b, 1 + 8 * h, quarter, codes);
            look_up_16(TWO_BIT_TABLE, codes);
            add_to(8, codes, shift_where(extra, quarter, 5));
            VF scale[1] = {VF_MUL(b.row_scale, signed_five(low, 4 * quarter, extra, 8 + quarter))};
            put_32(MR, KTK_BLOCK_iq2_ks, s, codes, scale, NULL);
        }
        extra = VI_SRL32(extra, 4);
        low = VI_SRL32(low, 16);
    }
}
