/* Byte e; 16 bytes: low nibbles are weights 0..15, high ones 16..31. Weight = table[nibble] * 2 **
 * (e - 128). Symbols: lf_gemm_mxfp4_avx2 lf_gemm_mxfp4_avx512 lf_gemm_mxfp4_avx512vnni. */
INLINE void decode_mxfp4(const int MR, block b, sink *s) {
    VI codes[8];
    nibbles_16(b, 0, codes, codes + 4);
    look_up_16(MXFP4_TABLE, codes);
    /* Half of 2 ** (e - 127), whose bits are e << 23 but for 2 ** -127 and 2 ** 128. */
    VF twice = VF_BITS(VI_MAX_U32(VI_SLL32(VI_U8(LOW_128(b.heads)), 23), VI_SET32(0x00400000)));
    VF scale[1] = {VF_MIN(VF_MUL(twice, VF_SET(0.5f)), VF_SET(0x1p127f))};
    put_32(MR, KTK_BLOCK_mxfp4, s, codes, scale, NULL);
}
