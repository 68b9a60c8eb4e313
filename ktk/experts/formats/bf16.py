"""bf16: the checkpoint's weights as they are; activations and sums stay fp32."""

from ktk.experts.formats.base import QuantFormat

BF16 = QuantFormat(name="bf16", bits=16, is_integer=False)
