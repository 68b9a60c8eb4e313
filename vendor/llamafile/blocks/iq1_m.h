/* 32 bytes, the low eight bits of the grid indices; 32 nibbles: their three high bits and the sign
 * of delta = 1 / 8; 4 words: four scales of groups of 16 each and a nibble of half d. Weight =
 * (point + delta) * (d * (2 * scale + 1)); codes are 8 * (point + delta) + 9. Symbols:
 * lf_gemm_iq1_m_avx2 lf_gemm_iq1_m_avx512 lf_gemm_iq1_m_avx512vnni. */
INLINE void decode_iq1_m(const int MR, block b, sink *s) {
    const VI mask = VI_SET32(0x07000700), two = VI_SET8(2);
    const VI w01 = dword(b, 12), w23 = dword(b, 13);
    const VI low = VI_OR(VI_AND(VI_SRL32(w01, 12), VI_SET32(0x000f)),
                         VI_AND(VI_SRL32(w01, 24), VI_SET32(0x00f0)));
    const VI high = VI_OR(VI_AND(VI_SRL32(w23, 4), VI_SET32(0x0f00)),
                          VI_AND(VI_SRL32(w23, 16), VI_SET32(0xf000)));
    const VF d = VF_MUL(VF_LOW_HALF(VI_OR(low, high)), VF_SET(0.125f));
    VI nibbles = VI_ZERO(), scales = w01;
    uint8_t at[16][64] __attribute__((aligned(64)));
    for (int g = 0; g < 8; g++) {
        nibbles = g % 2 ? VI_SRL32(nibbles, 16) : dword(b, 8 + g / 2);
        word_indices(dword(b, g), at + 2 * g, mask, VI_SLL32(nibbles, 8), VI_SLL32(nibbles, 16),
                     VI_SLL32(nibbles, 4), VI_SLL32(nibbles, 12));
    }
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        nibbles = g % 2 ? VI_SRL32(nibbles, 16) : dword(b, 8 + g / 2);
        /* The grid's codes have delta +1 / 8. */
        const VI minus[2] = {VI_AND(VI_SRL16(nibbles, 2), two), VI_AND(VI_SRL16(nibbles, 6), two)};
        UNROLL
        for (int l = 0; l < 4; l++) {
            grid_8(lf_grid_iq1, at[2 * g + l % 2] + 2 * (l / 2), 2, codes + 2 * l);
            const VI delta = byte_everywhere(minus[l % 2], l / 2);
            codes[2 * l] = VI_XOR(codes[2 * l], delta);
            codes[2 * l + 1] = VI_XOR(codes[2 * l + 1], delta);
        }
        VF scale[2] = {VF_MUL(d, odd_scale(scales, 0)), VF_MUL(d, odd_scale(scales, 3))};
        scales = g == 3 ? w23 : g % 2 ? VI_SRL32(scales, 10) : VI_SRL32(scales, 6);
        put_32(MR, KTK_BLOCK_iq1_m, s, codes, scale, NULL);
    }
}
