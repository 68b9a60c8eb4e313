/* Half d; 16 bits, one a group of 16: its values are larger by 4; 4 bytes: two high bits of 16
 * scales; 8 bytes: their low nibbles; 128 bytes: of each 16, low nibbles are weights 0..15 of
 * 32, high ones 16..31. Weight = table[nibble] * (d * (scale - 32)). Symbols: lf_gemm_iq4_k_avx2
 * lf_gemm_iq4_k_avx512 lf_gemm_iq4_k_avx512vnni. */
INLINE void decode_iq4_k(const int MR, block b, sink *s) {
    const VF d = VF_LOW_HALF(dword(b, 0));
    VI shifts = VI_SRL32(dword(b, 0), 16), low = VI_ZERO();
    VI high = VI_XOR(dword(b, 1), VI_SET8((char)0xaa));
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        low = g % 4 ? VI_SRL32(low, 8) : dword(b, 2 + g / 4);
        nibbles_16(b, 4 + 4 * g, codes, codes + 4);
        look_up_16(IQ4_TABLE, codes);
        add_shifts(codes, shifts, 0, 4);
        VF scale[2] = {VF_MUL(d, signed_six(low, 0, high, 0)),
                       VF_MUL(d, signed_six(low, 4, high, 2))};
        put_32(MR, KTK_BLOCK_iq4_k, s, codes, scale, NULL);
        shifts = VI_SRL32(shifts, 2);
        high = VI_SRL32(high, 4);
    }
}
