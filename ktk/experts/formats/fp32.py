"""fp32: the exact twin for fp32 and fp16 checkpoints, and for tests."""

from ktk.experts.formats.base import QuantFormat

FP32 = QuantFormat(name="fp32", bits=32, is_integer=False)
