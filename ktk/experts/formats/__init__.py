"""How a matrix is coded. One file and one line here per format; tests and benches loop over FORMATS."""

from __future__ import annotations

from ktk.experts.formats.base import QuantFormat
from ktk.experts.formats.bf16 import BF16
from ktk.experts.formats.fp32 import FP32
from ktk.experts.formats.gguf import GGUF
from ktk.experts.formats.int4 import INT4
from ktk.experts.formats.int8 import INT8

# Ordered by bits per weight, fewest first.
FORMATS: dict[str, QuantFormat] = {f.name: f for f in (INT4, INT8, BF16, FP32)}


def get_format(name: str) -> QuantFormat:
    """The format called ``name``; ValueError lists the known ones."""
    if name == GGUF.name:
        return GGUF
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise ValueError(f"weight_format={name!r}: must be one of {', '.join(FORMATS)}") from None


__all__ = ["FORMATS", "GGUF", "QuantFormat", "get_format"]
