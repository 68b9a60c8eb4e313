/* Rows begin with fp32 d. 8 bytes, one a group of 32: bit 0, its values are larger by 4, and the
 * scale; 128 bytes of nibbles as in IQ4_K. Weight = table[nibble] * (d * (scale - 127)), scale
 * being even. Symbols: lf_gemm_iq4_ks_avx2 lf_gemm_iq4_ks_avx512 lf_gemm_iq4_ks_avx512vnni. */
INLINE void decode_iq4_ks(const int MR, block b, sink *s) {
    VI scales = VI_ZERO();
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        scales = g % 4 ? VI_SRL32(scales, 8) : dword(b, g / 4);
        nibbles_16(b, 2 + 4 * g, codes, codes + 4);
        look_up_16(IQ4_TABLE, codes);
        add_to(8, codes, shift_where(scales, 0, 4));
        VF scale[1] = {VF_MUL(b.row_scale, seven_bit_scale(scales))};
        put_32(MR, KTK_BLOCK_iq4_ks, s, codes, scale, NULL);
    }
}
