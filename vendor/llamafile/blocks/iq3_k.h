/* Half d; 16 bits, one a group of 16: its values are larger by 4; 16 bits: its scale is
 * negative; 8 bytes: scales of groups, a nibble each; 64 bytes: two low bits as in Q2_K; 32
 * bytes: bit g of byte l is the third of weight l of 32 weights g. Weight = table[code] * (d *
 * +-(2 * scale + 1)). Symbols: lf_gemm_iq3_k_avx2 lf_gemm_iq3_k_avx512 lf_gemm_iq3_k_avx512vnni. */
INLINE void decode_iq3_k(const int MR, block b, sink *s) {
    const VI third = VI_SET8(4), sign = VI_SET32((int)0x80000000u);
    const VF d = half_head(b);
    VI both = dword(b, 0), high[8];
    for (int h = 0; h < 2; h++) {
        const VI low = dword(b, 1 + h);
        UNROLL
        for (int i = 0; i < 8; i++) high[i] = h ? VI_SRL16(high[i], 4) : dword(b, 19 + i);
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8];
            two_bits(b, 3 + 8 * h, quarter, codes);
            UNROLL
            for (int i = 0; i < 8; i++) {
                VI bits = quarter < 3 ? VI_SLL16(high[i], 2 - quarter) : VI_SRL16(high[i], 1);
                codes[i] = VI_OR(codes[i], VI_AND(bits, third));
            }
            look_up_16(THREE_BIT_TABLE, codes);
            add_shifts(codes, both, 2 * quarter, 4);
            VF scale[2];
            UNROLL
            for (int i = 0; i < 2; i++) {
                VF odd = VF_FMA(low_nibble(low, 8 * quarter + 4 * i), VF_SET(2.0f), VF_SET(1.0f));
                VI negated = VI_AND(VI_SLL32(both, 15 - 2 * quarter - i), sign);
                scale[i] = VF_BITS(VI_XOR(VI_BITS(VF_MUL(d, odd)), negated));
            }
            put_32(MR, KTK_BLOCK_iq3_k, s, codes, scale, NULL);
        }
        both = VI_SRL32(both, 8);
    }
}
