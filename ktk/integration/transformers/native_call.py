"""Tensors through a ``DecoderLayer``: one token, or rows of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ktk.ops.decoder import DecoderLayer, Pages

# As ktk's arrays have them: bf16 as bits.
DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
}


def run_native(
    layer: DecoderLayer,
    x: torch.Tensor,
    turns: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """A token through the layer, its key and value written to the last rows.

    x : (1, 1, hidden_size), of a dtype in ``DTYPES``.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    at = turns.data_ptr()
    _, key_head, key_row, _ = keys.stride()
    _, value_head, value_row, _ = values.stride()
    layer.native.forward_row(
        DTYPES[x.dtype].char,
        x.data_ptr(),
        at,
        at + turns.stride(0) * 4,
        keys.data_ptr(),
        key_head,
        key_row,
        values.data_ptr(),
        value_head,
        value_row,
        keys.shape[2] - 1,
        out.data_ptr(),
    )
    return out


def run_rows(
    layer: DecoderLayer,
    x: torch.Tensor,
    turns: torch.Tensor,
    pages: Sequence[Pages],
    sequence: Sequence[int],
    position: Sequence[int],
    chosen: np.ndarray | None,
) -> torch.Tensor:
    """``DecoderLayer.forward`` of tensors, whose arguments the caller has checked.

    x : (1, rows, hidden_size), of a dtype in ``DTYPES``. turns : float32 (2, rows, rotary_dim / 2).
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    layer.run(
        DTYPES[x.dtype],
        (x.data_ptr(), turns[0].data_ptr(), turns[1].data_ptr(), out.data_ptr()),
        [table.native for table in pages],
        sequence,
        position,
        chosen,
    )
    return out
