/* exp for vectors, in the operations and the order that ktk/reference/activation.py states. */
#ifndef KTK_EXP_H
#define KTK_EXP_H

#include <string.h>

#include "vec.h"

INLINE uint32_t bits_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

static const float MAGIC =
    12582912.0f; /* 1.5 * 2^23: added and subtracted, it rounds half to even below 2^22 */

/* exp on [-87, 88], Cephes' polynomial; see ktk/reference/activation.py. */
INLINE VF exp_clamped(VF x) {
    const VF magic = VF_SET(MAGIC);
    x = VF_MIN(VF_SET(88.0f), VF_MAX(VF_SET(-87.0f), x));
    VF n = VF_SUB(VF_ADD(VF_MUL(x, VF_SET(1.44269504088896341f)), magic), magic);
    VF r = VF_FMA(n, VF_SET(-0.693359375f), x);
    r = VF_FMA(n, VF_SET(2.12194440e-4f), r);
    VF p = VF_SET(1.9875691500e-4f);
    p = VF_FMA(p, r, VF_SET(1.3981999507e-3f));
    p = VF_FMA(p, r, VF_SET(8.3334519073e-3f));
    p = VF_FMA(p, r, VF_SET(4.1665795894e-2f));
    p = VF_FMA(p, r, VF_SET(1.6666665459e-1f));
    p = VF_FMA(p, r, VF_SET(5.0000001201e-1f));
    p = VF_ADD(VF_FMA(p, VF_MUL(r, r), r), VF_SET(1.0f));
    /* n + MAGIC holds the integer n in its low bits, NaN holds nonsense that p, a NaN too,
     * swallows. */
    VI power = VI_SUB32(VI_BITS(VF_ADD(n, magic)), VI_SET32((int)bits_of(MAGIC) - 127));
    return VF_MUL(p, VF_BITS(VI_SLL32(power, 23)));
}

#endif
