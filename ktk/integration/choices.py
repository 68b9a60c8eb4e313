"""What ``linear=`` may be wherever a model is opened: how its dense linear layers run.

It means the same everywhere.
"""

from __future__ import annotations

PACKED_LINEAR = ("int8", "int4")
# file: as they are stored, a GGUF file's blocks or bf16 and fp16 weights; int8, int4: packed; none:
# by torch.
LINEAR = ("file", *PACKED_LINEAR, "none")


def check_linear(given: str) -> None:
    """ValueError for what ``linear`` cannot be."""
    if given not in LINEAR:
        raise ValueError(f"linear={given!r}: must be one of {', '.join(LINEAR)}")
