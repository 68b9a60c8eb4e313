"""Rows of a GGUF file as floats, whatever their type: the gguf package decodes ggml's types, NumPy
here those of ik_llama.cpp.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats import ik_decode
from ktk.experts.formats.ik import ROWS

IK_TYPES = {row.name: row for row in ROWS}


def decode_rows(name: str, rows: np.ndarray) -> np.ndarray:
    """The rows of a type, uint8 (..., row bytes), as float32 (..., in_features).

    A file's scales may be inf or NaN, and so are its weights then. Raises ValueError for a type
    that nothing decodes.
    """
    with np.errstate(all="ignore"):
        if name in IK_TYPES:
            return ik_decode.decode(IK_TYPES[name], rows)
        import gguf

        try:
            kind = gguf.GGMLQuantizationType[name]
            return np.asarray(gguf.dequantize(np.ascontiguousarray(rows), kind), np.float32)
        except (KeyError, NotImplementedError):
            raise ValueError(f"neither ktk nor the gguf package decodes {name}") from None
