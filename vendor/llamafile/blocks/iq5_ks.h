/* Rows begin with fp32 d. 8 bytes of scales as in IQ4_KS, values being larger by 2; codes as in
 * IQ5_K. Weight = table[code] * (d * (scale - 127)), scale being even. Symbols:
 * lf_gemm_iq5_ks_avx2 lf_gemm_iq5_ks_avx512 lf_gemm_iq5_ks_avx512vnni. */
INLINE void decode_iq5_ks(const int MR, block b, sink *s) {
    VI scales = VI_ZERO(), fifth[8];
    for (int c = 0; c < 4; c++) {
        scales = c % 2 ? VI_SRL32(scales, 16) : dword(b, c / 2);
        VI even[8], odd[8];
        nibbles_16(b, 2 + 8 * c, even, odd);
        nibbles_16(b, 6 + 8 * c, even + 4, odd + 4);
        UNROLL
        for (int i = 0; i < 8; i++) {
            fifth[i] = c ? VI_SRL16(fifth[i], 2) : dword(b, 34 + i);
            even[i] = look_up_32(FIVE_BIT_TABLE, even[i], fifth[i], VI_SET8(1));
            odd[i] = look_up_32(FIVE_BIT_TABLE, odd[i], fifth[i], VI_SET8(2));
        }
        add_to(8, even, shift_where(scales, 0, 2));
        add_to(8, odd, shift_where(scales, 8, 2));
        VF scale[2] = {VF_MUL(b.row_scale, seven_bit_scale(scales)),
                       VF_MUL(b.row_scale, seven_bit_scale(VI_SRL32(scales, 8)))};
        put_32(MR, KTK_BLOCK_iq5_ks, s, even, scale, NULL);
        put_32(MR, KTK_BLOCK_iq5_ks, s, odd, scale + 1, NULL);
    }
}
