"""What keys and values may be kept in, by the names that users type."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk.ops.decoder import row_width

# As ``ktk.ops.decoder.Pages`` takes them: bf16 as bits; int8 rows of codes with a scale each.
KV_DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(np.uint16),
    "fp16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "fp32": np.dtype(np.float32),
}


def check_kv_dtype(name: str | None) -> None:
    """Raises ValueError if it is neither a row of KV_DTYPES nor None, the model's own."""
    if name is not None and name not in KV_DTYPES:
        raise ValueError(f"kv_dtype={name!r}: must be one of {', '.join(KV_DTYPES)}")


def row_bytes(width: int, dtype: np.dtype[Any]) -> int:
    """Of a key or value of so many numbers."""
    return row_width(width, dtype) * dtype.itemsize
