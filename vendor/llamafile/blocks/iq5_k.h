/* The first 16 bytes as in IQ4_K, values being larger by 2; 128 bytes: of each 32, low nibbles
 * are 32 weights, high ones the next 32; 32 bytes: bit g of byte l is the fifth of weight l of
 * 32 weights g. Weight = table[code] * (d * (scale - 32)). Symbols: lf_gemm_iq5_k_avx2
 * lf_gemm_iq5_k_avx512 lf_gemm_iq5_k_avx512vnni. */
INLINE void decode_iq5_k(const int MR, block b, sink *s) {
    const VF d = VF_LOW_HALF(dword(b, 0));
    VI shifts = VI_SRL32(dword(b, 0), 16), low = VI_ZERO(), fifth[8];
    VI high = VI_XOR(dword(b, 1), VI_SET8((char)0xaa));
    for (int c = 0; c < 4; c++) {
        low = c % 2 ? VI_SRL32(low, 16) : dword(b, 2 + c / 2);
        VI even[8], odd[8];
        nibbles_16(b, 4 + 8 * c, even, odd);
        nibbles_16(b, 8 + 8 * c, even + 4, odd + 4);
        UNROLL
        for (int i = 0; i < 8; i++) {
            fifth[i] = c ? VI_SRL16(fifth[i], 2) : dword(b, 36 + i);
            even[i] = look_up_32(FIVE_BIT_TABLE, even[i], fifth[i], VI_SET8(1));
            odd[i] = look_up_32(FIVE_BIT_TABLE, odd[i], fifth[i], VI_SET8(2));
        }
        add_shifts(even, shifts, 0, 2);
        add_shifts(odd, shifts, 2, 2);
        VF scale[4];
        UNROLL
        for (int i = 0; i < 4; i++) scale[i] = VF_MUL(d, signed_six(low, 4 * i, high, 2 * i));
        put_32(MR, KTK_BLOCK_iq5_k, s, even, scale, NULL);
        put_32(MR, KTK_BLOCK_iq5_k, s, odd, scale + 2, NULL);
        shifts = VI_SRL32(shifts, 4);
        high = VI_SRL32(high, 8);
    }
}
