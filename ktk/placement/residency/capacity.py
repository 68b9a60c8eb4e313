"""Room for experts as people write it: experts, a share of all, or bytes."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}


def parse_capacity(text: str, num_experts: int, expert_bytes: int) -> int:
    """Experts that fit, num_experts at most.

    text : "48" experts; "25%" of them; "8GiB", "500 MB" of memory. num_experts : of all layers.
    expert_bytes : of one; 0 = unknown. ValueError for any other text, and for bytes of experts
    whose size is unknown.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|(?:[KMGT]I?)?B)?", text.strip().upper())
    if match is None:
        raise ValueError(
            f"capacity {text!r}: must be a number of experts, a share as 25%, or bytes as 8GiB"
        )
    number, unit = match[1], match[2]
    if unit is None:
        if not number.isdecimal():
            raise ValueError(f"capacity {text!r}: must be a whole number of experts")
        return min(int(number), num_experts)
    if unit == "%":
        return min(int(float(number) * num_experts / 100), num_experts)
    if expert_bytes <= 0:
        raise ValueError(f"capacity {text!r}: the experts' size is unknown; give their number")
    return min(int(float(number) * _UNITS[unit[:-1]] / expert_bytes), num_experts)


def parse_bytes(text: str) -> int:
    """ "8GiB" as bytes. ValueError for what is no size."""
    if not text.strip().upper().endswith("B"):
        raise ValueError(f"{text!r} is no memory: must be bytes, as 8GiB or 500MB")
    return parse_capacity(text, 1 << 62, 1)
