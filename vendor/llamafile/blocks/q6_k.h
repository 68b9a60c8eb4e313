/* 128 bytes of low nibbles, 64 of two high bits, 16 signed scales of groups of 16, half d. Of each
 * 128 weights: l = 0..31 takes low nibble l and bits 0-1 of high byte l, 32 + l nibble 32 + l and
 * bits 2-3, 64 + l high nibble l and bits 4-5, 96 + l high nibble 32 + l and bits 6-7. Weight =
 * (code - 32) * (d * scale). Symbols: lf_gemm_q6_k_avx2 lf_gemm_q6_k_avx512
 * lf_gemm_q6_k_avx512vnni. */
INLINE void decode_q6_k(const int MR, block b, sink *s) {
    const VI low_mask = VI_SET8(15), high_mask = VI_SET8(48);
    const VF d = half_head(b);
    for (int h = 0; h < 2; h++) {
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            VI codes[8];
            VF scale[2];
            UNROLL
            for (int i = 0; i < 8; i++) {
                VI low = dword(b, 16 * h + 8 * (quarter & 1) + i), high = dword(b, 32 + 8 * h + i);
                if (quarter >= 2) low = VI_SRL16(low, 4);
                if (quarter == 0) high = VI_SLL16(high, 4);
                if (quarter == 1) high = VI_SLL16(high, 2);
                if (quarter == 3) high = VI_SRL16(high, 2);
                codes[i] = VI_OR(VI_AND(low, low_mask), VI_AND(high, high_mask));
            }
            VI both = dword(b, 48 + 2 * h + quarter / 2);
            if (quarter % 2) both = VI_SRL32(both, 16);
            scale[0] = VF_MUL(d, signed_byte(both, 0));
            scale[1] = VF_MUL(d, signed_byte(both, 1));
            put_32(MR, KTK_BLOCK_q6_k, s, codes, scale, NULL);
        }
    }
}
