"""Formats that lie in panels: what ``ktk convert`` and transformers' loading pack experts into."""

from __future__ import annotations

from ktk.experts.formats.base import GROUP_SIZES, Format, Plane, Search, steps

# Scales of a group are bf16, those of a whole channel f32 (``ktk.experts.layout``).
_GROUP_SCALES = Plane("scales", "bf16", 0)


def _coded(name: str, codes: str, *planes: Plane, groups: tuple[int, ...] = (0,)) -> Format:
    """A checkpoint's codes of few bits, as they are; of 4 bits activations are rounded finely."""
    return Format(
        name,
        (*planes, Plane("codes", codes)),
        "s15" if Plane("codes", codes).bits == 4 else "f32",
        group_sizes=groups,
        default_group=groups[0],
    )


def _levels(bits: int, levels: tuple[int, ...], magnitudes: tuple[int, ...]) -> Format:
    """2 ** bits levels times an integer for each group, one scale a channel.

    The levels lean to one side: a multiplier's sign chooses which. Products are int8, and every
    sum of them is exact.
    """
    return Format(
        f"nl{bits}",
        (
            Plane("scales", "f32", 0),
            Plane("multipliers", "u4", 0),
            Plane("codes", f"u{bits}"),
        ),
        "s8",
        zero_point=128,
        code_min=-127,
        code_max=127,
        group_sizes=(16, 32, 0),
        default_group=16,
        default_activation_group=256,
        default_rotation=64,
        levels=levels,
        multipliers=(*magnitudes, *(-m for m in magnitudes)),
    )


# Ordered by bits per weight, fewest first. Steps between levels grow with them, as IQ4_NL's do:
# rotated weights are nearly Gaussian.
PANELS = (
    _levels(2, (-10, -4, 0, 6), (5, 6, 7, 8, 9, 10, 11, 12)),
    _levels(3, (-8, -5, -3, -1, 0, 2, 4, 7), (6, 7, 8, 9, 10, 11, 12, 14)),
    _levels(
        4,
        (-10, -8, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9),
        (5, 6, 7, 8, 9, 10, 11, 12),
    ),
    # Symmetric. A scale may be negative: -8 then stands for the group's largest value, whatever its
    # sign.
    Format(
        "int4",
        (_GROUP_SCALES, Plane("codes", "u4")),
        "s8",
        zero_point=8,
        code_min=-8,
        code_max=7,
        group_sizes=(*GROUP_SIZES, 0),
        default_group=32,
        default_activation_group=128,
        search=Search(steps(5.6, 9.6, 0.25, True), 2, channel_ladder=steps(6.5, 18, 0.5, True)),
    ),
    # Of checkpoints: e2m1 codes with a power of two for 32 (gpt-oss, OCP MX), or with an e4m3 scale
    # for 16 and an fp32 one for the matrix (NVFP4).
    _coded("mxfp4", "e2m1", Plane("scales", "e8m0", 32), groups=(32,)),
    _coded(
        *("nvfp4", "e2m1", Plane("scales", "e4m3", 16), Plane("tensor_scale", "f32", 0)),
        groups=(16,),
    ),
    # AWQ, GPTQ, compressed-tensors with zero points: (code - zero point) * scale.
    _coded(
        *("int4_asym", "u4", Plane("scales", "f16", 0), Plane("zero_points", "u4", 0)),
        groups=(*GROUP_SIZES, 0),
    ),
    # Symmetric, one scale per output channel. Tried: absmax, then clipping ever more, for outliers
    # of a long channel.
    Format(
        "int8",
        (_GROUP_SCALES, Plane("codes", "u8")),
        "s8",
        zero_point=128,
        code_min=-127,
        code_max=127,
        default_activation_group=256,
        default_rotation=64,
        search=Search(refits=2, channel_ladder=tuple(127 * (1 + 0.02 * i) for i in range(16))),
    ),
    # Of checkpoints like DeepSeek-V3: one scale for 128 rows by 128 columns, codes and scales as
    # they are. Activations stay fp32: codes have 2**-9 to 448, no integers of eight bits, and
    # rounding activations too would lose more than the codes do.
    Format(
        "fp8",
        (Plane("scales", "f32", 128, 128), Plane("codes", "e4m3")),
        "f32",
        group_sizes=(128,),
        default_group=128,
    ),
    # The same with a scale a channel (compressed-tensors, ModelOpt, FBGEMM), of either kind of fp8;
    # and with a power of two for 32 of a row (OCP MX).
    _coded("fp8_channel", "e4m3", Plane("scales", "f32", 0)),
    _coded("fp8_e5m2", "e5m2", Plane("scales", "f32", 0)),
    _coded("mxfp8", "e4m3", Plane("scales", "e8m0", 32), groups=(32,)),
    # The checkpoint's weights as they are; activations and sums stay fp32.
    Format("bf16", (Plane("codes", "bf16"),), "f32"),
    # The exact twin for fp32 and fp16 checkpoints, and for tests.
    Format("fp32", (Plane("codes", "f32"),), "f32"),
)
