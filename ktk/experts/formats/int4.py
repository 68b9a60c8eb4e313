"""int4: symmetric, one bf16 scale per group (fp32 per channel), codes -8..7 with zero point 8.

The scale may be negative: -8 then stands for the group's largest value, whatever its sign.
"""

from ktk.experts.formats.base import GROUP_SIZES, QuantFormat

INT4 = QuantFormat(
    name="int4",
    bits=4,
    is_integer=True,
    zero_point=8,
    code_min=-8,
    code_max=7,
    group_sizes=(*GROUP_SIZES, 0),
    default_group=32,
    default_activation_group=128,
)
