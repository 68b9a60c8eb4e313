/* Half d; 32 words, nine bits of grid index and seven of sign; 8 bytes: scales of groups of 16, a nibble each.
 * Weight = +-point * (d * (scale + 1 / 2) / 4). */
INLINE void decode_iq2_xs(const int MR, block b, sink *s) {
    const VI index = VI_SET32(0x01ff01ff), low = VI_SET32(0x007f007f), high = VI_SET32(0x7f007f00);
    const VF d = half_head(b);
    for (int h = 0; h < 2; h++) {
        const VI scales = dword(b, 16 + h);
        UNROLL
        for (int g = 0; g < 4; g++) {
            VI first = dword(b, 8 * h + 2 * g), second = dword(b, 8 * h + 2 * g + 1), codes[8];
            uint8_t at[2][64] __attribute__((aligned(64)));
            VI_STORE(at[0], VI_AND(first, index));
            VI_STORE(at[1], VI_AND(second, index));
            UNROLL
            for (int l = 0; l < 4; l++) grid_8(lf_grid_iq2_xs, at[l / 2] + 2 * (l % 2), 2, codes + 2 * l);
            VI signs = VI_OR(VI_AND(VI_SRL16(first, 9), low), VI_AND(VI_SRL16(second, 1), high));
            negate_where(codes, swap_middle_bytes(with_parity(signs)), 2 * 43);
            VF scale[2] = {VF_MUL(d, quarter_scale(scales, 2 * g)), VF_MUL(d, quarter_scale(scales, 2 * g + 1))};
            put_32(MR, FORMAT_iq2_xs, s, codes, scale, NULL);
        }
    }
}
