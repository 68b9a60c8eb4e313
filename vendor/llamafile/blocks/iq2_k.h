/* Half d; 16 bits, one a group of 16: its values are larger by 5; 8 bytes: scales of groups, a
 * nibble each; 64 bytes of codes as in Q2_K. Weight = table[code] * (d * (scale - 8)). Symbols:
 * lf_gemm_iq2_k_avx2 lf_gemm_iq2_k_avx512 lf_gemm_iq2_k_avx512vnni. */
INLINE void decode_iq2_k(const int MR, block b, sink *s) {
    const VF d = VF_LOW_HALF(dword(b, 0));
    VI shifts = VI_SRL32(dword(b, 0), 16);
    for (int h = 0; h < 2; h++) {
        const VI low = VI_XOR(dword(b, 1 + h), VI_SET8((char)0x88));
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8];
            two_bits(b, 3 + 8 * h, quarter, codes);
            look_up_16(TWO_BIT_TABLE, codes);
            add_shifts(codes, shifts, 2 * quarter, 5);
            VF scale[2] = {VF_MUL(d, signed_nibble(low, 8 * quarter)),
                           VF_MUL(d, signed_nibble(low, 8 * quarter + 4))};
            put_32(MR, KTK_BLOCK_iq2_k, s, codes, scale, NULL);
        }
        shifts = VI_SRL32(shifts, 8);
    }
}
