"""Types that ik_llama.cpp adds to GGUF files: rows of the table of formats, and what is refused.

Source: the block structures and type numbers of ik_llama.cpp (ggml-common.h, ggml.h).
"""

from __future__ import annotations

from typing import Any

from ktk.experts.formats.base import Format, Plane

BLOCK = 256
_ROW_F16: dict[str, Any] = {"row_scale": "f16"}
_ROW_F32: dict[str, Any] = {"row_scale": "f32"}
_SCALES = Plane("scales", "f16", BLOCK)
_SIGNS = Plane("signs", "u8", 8)


def _codes(bits: int, weights: int = 1) -> Plane:
    return Plane("codes", f"u{bits}", weights)


def _multipliers(dtype: str, weights: int) -> Plane:
    return Plane("multipliers", dtype, weights)


def _shifts(weights: int) -> Plane:
    return Plane("shifts", "u1", weights)


def _row(name: str, number: int, *planes: Plane, **more: Any) -> Format:
    return Format(name, planes, "s8", BLOCK, number, **more)


# Fewest bits per weight first. Of the trellis types (KT) codes are states that a hash turns into
# eight weights, or four.
ROWS = (
    _row("IQ1_KT", 158, _multipliers("u4", 32), _codes(13, 8), **_ROW_F32),
    _row("IQ2_KT", 153, _multipliers("u4", 32), _codes(16, 8), **_ROW_F32),
    _row("IQ2_KS", 145, _shifts(32), _multipliers("u5", 32), _codes(2), **_ROW_F16),
    _row("IQ2_K", 137, _SCALES, _shifts(16), _multipliers("u4", 16), _codes(2)),
    _row("IQ2_KL", 157, _multipliers("u6", 32), _codes(5, 2), **_ROW_F16),
    _row("IQ3_KT", 154, _multipliers("u4", 32), _codes(16, 8), _SIGNS, **_ROW_F32),
    _row("IQ3_KS", 156, _shifts(32), _multipliers("u5", 32), _codes(3), **_ROW_F16),
    _row("IQ3_K", 138, _SCALES, _shifts(16), _multipliers("u5", 16), _codes(3)),
    # Its shift is that of a state.
    _row("IQ4_KT", 155, _shifts(32), _multipliers("u7", 32), _codes(15, 4), **_ROW_F32),
    # Four codes have an even number of set bits.
    _row("IQ4_KSS", 146, _shifts(32), _multipliers("u7", 32), _codes(15, 4), **_ROW_F32),
    _row("IQ4_KS", 144, _shifts(32), _multipliers("u7", 32), _codes(4), **_ROW_F32),
    _row("IQ4_K", 139, _SCALES, _shifts(16), _multipliers("u6", 16), _codes(4)),
    _row("IQ5_KS", 152, _shifts(32), _multipliers("u7", 32), _codes(5), **_ROW_F32),
    _row("IQ5_K", 140, _SCALES, _shifts(16), _multipliers("u6", 16), _codes(5)),
    _row("IQ6_K", 141, _SCALES, _shifts(16), _multipliers("s8", 16), _codes(6)),
)

# Rows of several channels interleaved: number -> (name, the type to have instead).
INTERLEAVED = {
    202: ("Q4_0_R8", "Q4_0"),
    206: ("Q5_0_R4", "Q5_0"),
    208: ("Q8_0_R8", "Q8_0"),
    210: ("Q2_K_R4", "Q2_K"),
    211: ("Q3_K_R4", "Q3_K"),
    212: ("Q4_K_R4", "Q4_K"),
    213: ("Q5_K_R4", "Q5_K"),
    214: ("Q6_K_R4", "Q6_K"),
    216: ("IQ2_XXS_R4", "IQ2_XXS"),
    217: ("IQ2_XS_R4", "IQ2_XS"),
    218: ("IQ3_XXS_R4", "IQ3_XXS"),
    219: ("IQ1_S_R4", "IQ1_S"),
    220: ("IQ4_NL_R4", "IQ4_NL"),
    221: ("IQ3_S_R4", "IQ3_S"),
    222: ("IQ2_S_R4", "IQ2_S"),
    223: ("IQ4_XS_R8", "IQ4_XS"),
    229: ("IQ1_M_R4", "IQ1_M"),
    230: ("BF16_R16", "BF16"),
    233: ("Q6_0_R4", "Q6_K"),
    335: ("IQ2_BN_R4", "TQ2_0"),
    337: ("IQ2_K_R4", "IQ2_K"),
    338: ("IQ3_K_R4", "IQ3_K"),
    339: ("IQ4_K_R4", "IQ4_K"),
    340: ("IQ5_K_R4", "IQ5_K"),
    344: ("IQ4_KS_R4", "IQ4_KS"),
    352: ("IQ5_KS_R4", "IQ5_KS"),
    397: ("Q8_K_R16", "Q8_0"),
    398: ("Q8_KV_R8", "Q8_0"),
    399: ("Q8_K_R8", "Q8_0"),
}
# Other types of that program that nothing here reads -> (name, a type of about as many bits).
UNREAD = {
    133: ("Q6_0", "Q6_K"),
    134: ("IQ1_BN", "TQ1_0"),
    135: ("IQ2_BN", "TQ2_0"),
    136: ("Q8_K64", "Q8_0"),
    151: ("Q8_KV", "Q8_0"),
}
