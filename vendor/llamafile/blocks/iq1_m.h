/* 32 bytes, the low eight bits of the grid indices; 32 nibbles: their three high bits and the sign of delta = 1 / 8; 4
 * words: four scales of groups of 16 each and a nibble of half d. Weight = (point + delta) * (d * (2 * scale + 1)); codes
 * are 8 * (point + delta) + 9. */
INLINE void decode_iq1_m(const int MR, block b, sink *s) {
    const VI w01 = dword(b, 12), w23 = dword(b, 13), two = VI_SET8(2);
    const VI bits = VI_OR(VI_OR(VI_AND(VI_SRL32(w01, 12), VI_SET32(0xf)), VI_AND(VI_SRL32(w01, 24), VI_SET32(0xf0))),
                          VI_OR(VI_AND(VI_SRL32(w23, 4), VI_SET32(0xf00)), VI_AND(VI_SRL32(w23, 16), VI_SET32(0xf000))));
    const VF d = VF_MUL(VF_LOW_HALF(bits), VF_SET(0.125f));
    UNROLL
    for (int g = 0; g < 8; g++) {
        VI codes[8];
        uint8_t at[2][64] __attribute__((aligned(64)));
        const VI nibbles = dword(b, 8 + g / 2), high = g % 2 ? VI_SRL32(nibbles, 16) : nibbles;
        word_indices(dword(b, g), at, VI_SET32(0x07000700), VI_SLL32(high, 8), VI_SLL32(high, 16),
                     VI_SLL32(high, 4), VI_SLL32(high, 12));
        /* Codes as the grid has them have delta +1. */
        const VI minus[2] = {VI_AND(VI_SRL16(high, 2), two), VI_AND(VI_SRL16(high, 6), two)};
        UNROLL
        for (int l = 0; l < 4; l++) {
            grid_8(lf_grid_iq1, at[l % 2] + 2 * (l / 2), 2, codes + 2 * l);
            const VI delta = byte_everywhere(minus[l % 2], l / 2);
            codes[2 * l] = VI_XOR(codes[2 * l], delta);
            codes[2 * l + 1] = VI_XOR(codes[2 * l + 1], delta);
        }
        const VI word = g < 4 ? w01 : w23;
        const int at_bit = 16 * (g / 2 % 2) + 6 * (g % 2);
        VF scale[2] = {VF_MUL(d, odd_scale(word, at_bit)), VF_MUL(d, odd_scale(word, at_bit + 3))};
        put_32(MR, FORMAT_iq1_m, s, codes, scale, NULL);
    }
}
