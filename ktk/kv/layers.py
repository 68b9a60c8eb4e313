"""Keys and values of one layer with room to grow:
a new token is written behind the others instead of copying them all.
"""

from __future__ import annotations

import torch

LEAST_ROWS = 256
GROWTH = 1.5


class GrowingRows:
    """Memory (batch, heads, rows, width); what is cached is a view of some of its rows,
    and may be cut at both ends.
    """

    def __init__(self) -> None:
        self._data: torch.Tensor | None = None
        self._first = 0
        self._given: torch.Tensor | None = None  # what with_room gave last

    def with_room(self, cached: torch.Tensor, like: torch.Tensor, more: int) -> torch.Tensor:
        """The cached rows, moved if they must be, and behind them room for ``more``: the view of
        both.

        cached : (batch, heads, rows, width), a view of this memory, another tensor, or none yet
            (not of four dimensions).
        like : of the batch, heads, width, dtype and device of the rows to come.
        """
        length = cached.shape[2] if cached.ndim == 4 else 0
        if not self._holds(cached, length, more):
            batch, heads, _, width = like.shape
            rows = max(LEAST_ROWS, int((length + more) * GROWTH))
            data = torch.empty(batch, heads, rows, width, dtype=like.dtype, device=like.device)
            if length:
                data[:, :, :length] = cached
            self._data, self._first = data, 0
        assert self._data is not None
        self._given = self._data.narrow(2, self._first, length + more)
        return self._given

    def _holds(self, cached: torch.Tensor, length: int, more: int) -> bool:
        data = self._data
        if data is None or not length or cached.shape[0] != data.shape[0]:
            return False
        if data.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids writing to it
        if cached is self._given:  # as it is for each token of an answer
            return self._first + length + more <= data.shape[2]
        skipped = cached.storage_offset() - data.storage_offset()
        if cached.untyped_storage().data_ptr() != data.untyped_storage().data_ptr():
            return False
        first, rest = divmod(int(skipped), int(data.shape[-1]))
        if rest or cached.stride() != data.stride():
            return False
        if not 0 <= first <= data.shape[2] - length - more:
            return False
        self._first = first
        return True
