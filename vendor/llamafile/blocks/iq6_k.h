/* Half d; 16 bits, one a group of 16: its values are larger by 1; 16 signed scales of groups;
 * 128 bytes of low nibbles as in IQ5_K; 64 bytes of two high bits as the codes of Q2_K. Weight =
 * table[code] * (d * scale). Symbols: lf_gemm_iq6_k_avx2 lf_gemm_iq6_k_avx512
 * lf_gemm_iq6_k_avx512vnni. */
INLINE void decode_iq6_k(const int MR, block b, sink *s) {
    const VI low_mask = VI_SET8(15), fifth = VI_SET8(16), sixth = VI_SET8(32);
    const VF d = VF_LOW_HALF(dword(b, 0));
    VI shifts = VI_SRL32(dword(b, 0), 16);
    for (int h = 0; h < 2; h++) {
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8];
            UNROLL
            for (int i = 0; i < 8; i++) {
                VI low = dword(b, 5 + 16 * h + quarter / 2 * 8 + i),
                   high = dword(b, 37 + 8 * h + i);
                if (quarter % 2) low = VI_SRL16(low, 4);
                high =
                    quarter < 2 ? VI_SLL16(high, 4 - 2 * quarter) : VI_SRL16(high, 2 * quarter - 4);
                low = VI_AND(low, low_mask);
                codes[i] =
                    VI_WHERE_BIT(high, sixth, look_up_32(SIX_BIT_TABLE + 32, low, high, fifth),
                                 look_up_32(SIX_BIT_TABLE, low, high, fifth));
            }
            add_shifts(codes, shifts, 2 * quarter, 1);
            const VI both = dword(b, 1 + 2 * h + quarter / 2);
            VF scale[2] = {VF_MUL(d, signed_byte(both, 2 * (quarter % 2))),
                           VF_MUL(d, signed_byte(both, 2 * (quarter % 2) + 1))};
            put_32(MR, KTK_BLOCK_iq6_k, s, codes, scale, NULL);
        }
        shifts = VI_SRL32(shifts, 8);
    }
}
