"""The types that tensors of GGUF files have: names, sizes, and which of them are refused.

Those of llama.cpp are the gguf package's; ik_llama.cpp numbers its own from 133 on.
"""

from __future__ import annotations

from typing import NamedTuple

import gguf

from ktk.experts.formats.ik import INTERLEAVED, ROWS, UNREAD

# Types that llama.cpp dropped: a number nothing reads any more -> its name.
REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


class TensorType(NamedTuple):
    """weights, num_bytes : of a block. row_head : bytes of a row before its blocks."""

    weights: int
    num_bytes: int
    row_head: int = 0

    def row_bytes(self, in_features: int) -> int:
        """Of a row of whole blocks."""
        return self.row_head + in_features // self.weights * self.num_bytes


TYPES = {
    **{row.name: TensorType(row.block, row.block_bytes, row.row_head) for row in ROWS},
    **{kind.name: TensorType(*size) for kind, size in gguf.GGML_QUANT_SIZES.items()},
}
_NAMES: dict[int, str] = {
    **REMOVED_TYPES,
    **{number: name for number, (name, _) in {**INTERLEAVED, **UNREAD}.items()},
    **{row.number: row.name for row in ROWS if row.number is not None},
    **{int(kind): kind.name for kind in gguf.GGML_QUANT_SIZES},
}


def type_name(number: int) -> str:
    """What a type is called: a key of TYPES, or that of one which is not read."""
    return _NAMES.get(number, f"type {number}")


def why_refused(name: str) -> str:
    """What the owner of a file can do about a type that is not in TYPES."""
    if name in REMOVED_TYPES.values():
        return "llama.cpp removed this type; re-quantise the model from its original weights"
    if instead := dict(INTERLEAVED.values()).get(name):
        return (
            "rows interleaved for ik_llama.cpp's own kernels; get the model in "
            f"{instead}, or quantise it to {instead} and leave out --repack"
        )
    if instead := dict(UNREAD.values()).get(name):
        return f"a type of ik_llama.cpp that is not read here; get the model in {instead}"
    from importlib.metadata import version

    return f"not known to gguf {version('gguf')}; a newer gguf package may know it"
