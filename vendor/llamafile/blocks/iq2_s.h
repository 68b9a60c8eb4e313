/* Half d; 32 bytes, the low eight bits of the grid indices; 32 bytes of signs; 8 bytes: two high bits of four indices each;
 * 8 bytes: scales of groups of 16, a nibble each. Weight = +-point * (d * (scale + 1 / 2) / 4). */
INLINE void decode_iq2_s(const int MR, block b, sink *s) {
    const VF d = half_head(b);
    for (int h = 0; h < 2; h++) {
        const VI high = dword(b, 16 + h), scales = dword(b, 18 + h);
        UNROLL
        for (int g = 0; g < 4; g++) {
            VI codes[8];
            uint8_t at[2][64] __attribute__((aligned(64)));
            const VI two = g ? VI_SRL32(high, 8 * g) : high;
            word_indices(dword(b, 4 * h + g), at, VI_SET32(0x03000300), VI_SLL32(two, 8), VI_SLL32(two, 20),
                         VI_SLL32(two, 6), VI_SLL32(two, 18));
            UNROLL
            for (int l = 0; l < 4; l++) grid_8(lf_grid_iq2_s, at[l % 2] + 2 * (l / 2), 2, codes + 2 * l);
            negate_where(codes, dword(b, 8 + 4 * h + g), 2 * 43);
            VF scale[2] = {VF_MUL(d, quarter_scale(scales, 2 * g)), VF_MUL(d, quarter_scale(scales, 2 * g + 1))};
            put_32(MR, FORMAT_iq2_s, s, codes, scale, NULL);
        }
    }
}
