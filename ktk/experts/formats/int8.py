"""int8: symmetric, one fp32 scale per output channel, codes -127..127 stored with zero point 128."""

from ktk.experts.formats.base import QuantFormat

INT8 = QuantFormat(
    name="int8",
    bits=8,
    is_integer=True,
    zero_point=128,
    code_min=-127,
    code_max=127,
    default_activation_group=64,
)
