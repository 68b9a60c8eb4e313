/* What the decoders of ik_llama.cpp's types are made of, besides decode.h's: tables of values, plus
 * the format's zero point, and the trellis. */
#ifndef LF_IK_H
#define LF_IK_H

static const uint8_t TWO_BIT_TABLE[16] = {0, 18, 32, 48};
static const uint8_t THREE_BIT_TABLE[16] = {0, 23, 40, 53, 64, 76, 91, 110};
static const uint8_t FIVE_BIT_TABLE[32] = {2,   14,  25,  36,  45,  54,  63,  71,  78,  85,  92,
                                           98,  104, 110, 116, 122, 127, 133, 139, 145, 151, 157,
                                           164, 171, 179, 187, 196, 205, 215, 225, 237, 249};
static const uint8_t SIX_BIT_TABLE[64] = {
    1,   7,   13,  19,  24,  30,  35,  40,  44,  49,  54,  58,  62,  66,  70,  74,
    77,  81,  84,  88,  91,  94,  97,  100, 103, 106, 109, 112, 115, 117, 120, 123,
    126, 128, 131, 134, 137, 140, 142, 145, 148, 151, 155, 158, 161, 164, 168, 172,
    175, 179, 183, 187, 191, 196, 200, 205, 210, 215, 220, 226, 231, 237, 243, 249};
/* What two neighbours are that share an index. */
static const uint8_t FIRST_TABLE[32] = {0,  0,  23, 23, 23, 23, 40, 40, 40,  40, 40,
                                        53, 53, 53, 53, 64, 64, 64, 64, 64,  76, 76,
                                        76, 76, 76, 91, 91, 91, 91, 91, 110, 110};
static const uint8_t SECOND_TABLE[32] = {40, 76, 0,  53,  76, 110, 23, 40,  64, 76, 91,
                                         0,  64, 76, 110, 40, 53,  64, 76,  91, 23, 40,
                                         53, 64, 76, 0,   40, 64,  91, 110, 40, 76};

/* Bytes of `shift` in lanes whose bit is set, else 0. */
INLINE VI shift_where(VI bits, int bit, char shift) {
    return VI_AND(VI_SRA32(VI_SLL32(bits, 31 - bit), 31), VI_SET8(shift));
}
INLINE void add_to(int count, VI *codes, VI more) {
    UNROLL
    for (int i = 0; i < count; i++) codes[i] = VI_ADD8(codes[i], more);
}
/* Values of 32 weights, which bits `bit` and bit + 1 shift, one for 16. */
INLINE void add_shifts(VI codes[8], VI bits, int bit, char shift) {
    add_to(4, codes, shift_where(bits, bit, shift));
    add_to(4, codes + 4, shift_where(bits, bit + 1, shift));
}

/* Nibbles and a fifth bit of each byte, where `mask` has a bit of `fifth`'s, to values. */
INLINE VI look_up_32(const uint8_t *table, VI nibbles, VI fifth, VI mask) {
    return VI_WHERE_BIT(fifth, mask, VI_SHUFFLE8(VI_LOAD_TABLE(table + 16), nibbles),
                        VI_SHUFFLE8(VI_LOAD_TABLE(table), nibbles));
}

/* -- integers that multiply the scale, at bits of dwords */

INLINE VF low_nibble(VI x, int at) { return VF_CVT(VI_AND(VI_SRL32(x, at), VI_SET32(15))); }
/* Nibble less 8, of which bit 3 is inverted. */
INLINE VF signed_nibble(VI x, int at) { return VF_CVT(VI_SRA32(VI_SLL32(x, 28 - at), 28)); }
/* A nibble of `low` and a bit of `high`, which is inverted, less 16. */
INLINE VF signed_five(VI low, int at, VI high, int bit) {
    VI four = VI_AND(VI_SRL32(low, at), VI_SET32(15));
    VI top = VI_SLL32(VI_SRA32(VI_SLL32(high, 31 - bit), 31), 4);
    return VF_CVT(VI_OR(four, top));
}
/* A nibble of `low` and two bits of `high`, of which the upper one is inverted, less 32. */
INLINE VF signed_six(VI low, int at, VI high, int bit) {
    VI four = VI_AND(VI_SRL32(low, at), VI_SET32(15));
    VI top = VI_SLL32(VI_SRA32(VI_SLL32(high, 30 - bit), 30), 4);
    return VF_CVT(VI_OR(four, top));
}
/* The upper seven bits of the lowest byte, twice, less 127. */
INLINE VF seven_bit_scale(VI x) {
    return VF_CVT(VI_SUB32(VI_AND(x, VI_SET32(254)), VI_SET32(127)));
}
/* The IQ4 value of a nibble. */
INLINE VF four_bit_scale(VI x, int at) {
    VI value = VI_SHUFFLE8(VI_LOAD_TABLE(IQ4_TABLE), VI_AND(VI_SRL32(x, at), VI_SET32(15)));
    return VF_CVT(VI_SUB32(VI_AND(value, VI_SET32(255)), VI_SET32(128)));
}

/* -- the trellis: each weight multiplies its index's state, and is the sum of the low six bits of
 * the state's bytes */

INLINE VI first_state(VI index) { return VI_ADD32(index, VI_SET32(4096)); }

/* The next four codes. */
INLINE VI next_four(VI *state) {
    const VI factor = VI_SET32((int)0xcbac1fedu), six = VI_SET8(63);
    VI codes = VI_ZERO();
    UNROLL
    for (int k = 0; k < 4; k++) {
        *state = VI_MUL32(*state, factor);
        VI sum = VI_MADD(VI_MADDUBS(VI_AND(*state, six), VI_SET8(1)), VI_SET16(1));
        codes = VI_OR(codes, k ? VI_SLL32(sum, 8 * k) : sum);
    }
    return codes;
}

#endif
