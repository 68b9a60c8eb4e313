"""KV cache layers with room to grow: a new token is written behind the others instead of copying them all."""

from __future__ import annotations

from typing import Any

import torch

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.names import DynamicLayer, DynamicSlidingWindowLayer

LEAST_ROWS = 256
GROWTH = 1.5


class _Buffer:
    """(batch, heads, rows, width): what is cached is a view of some rows."""

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.first = 0

    def view_with_room(self, cached: torch.Tensor, like: torch.Tensor, more: int) -> torch.Tensor:
        """The cached rows, moved if they must be, and behind them room for ``more``: the view of both."""
        length = cached.shape[-2] if cached.ndim == 4 else 0
        if not self._holds(cached, length, more):
            batch, heads, _, width = like.shape
            rows = max(LEAST_ROWS, int((length + more) * GROWTH))
            data = torch.empty(batch, heads, rows, width, dtype=like.dtype, device=like.device)
            if length:
                data[:, :, :length] = cached
            self.data, self.first = data, 0
        assert self.data is not None
        return self.data[:, :, self.first : self.first + length + more]

    def _holds(self, cached: torch.Tensor, length: int, more: int) -> bool:
        data = self.data
        if data is None or not length or cached.shape[0] != data.shape[0]:
            return False
        if data.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch forbids writing to it
        skipped = cached.storage_offset() - data.storage_offset()
        if cached.untyped_storage().data_ptr() != data.untyped_storage().data_ptr():
            return False
        first, rest = divmod(int(skipped), int(data.shape[-1]))
        if (
            rest
            or cached.stride() != data.stride()
            or not 0 <= first <= data.shape[2] - length - more
        ):
            return False
        self.first = first
        return True


class _Grows:
    """``update`` without torch.cat, for transformers' growing cache layers. _kept : rows kept for the next token; None: all."""

    keys: Any
    values: Any

    def take_over(self, layer: Any) -> None:
        """Become what ``layer`` is."""
        self.__dict__.update(layer.__dict__)
        self._key_rows, self._value_rows = _Buffer(), _Buffer()

    def _with_room(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:  # type: ignore[attr-defined]
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        more = key_states.shape[-2]
        keys = self._key_rows.view_with_room(self.keys, key_states, more)
        return keys, self._value_rows.view_with_room(self.values, value_states, more)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, more: int) -> None:
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, tokens, head_dim); returns all that the new tokens see."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Gradients need the old tensors as they were.
            grown: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)  # type: ignore[misc]
            return grown
        more = key_states.shape[-2]
        keys, values = self._with_room(key_states, value_states)
        keys[:, :, -more:] = key_states
        values[:, :, -more:] = value_states
        self._keep(keys, values, more)
        return keys, values

    def room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cached rows and one more to be written: views to hand to ``append``."""
        return self._with_room(self.keys[:, :, -1:], self.values[:, :, -1:])

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What ``room`` gave, its last row written."""
        self._keep(keys, values, 1)


class GrowingLayer(_Grows, DynamicLayer):
    """A DynamicLayer of the same contents."""


class GrowingSlidingWindowLayer(_Grows, DynamicSlidingWindowLayer):
    """A DynamicSlidingWindowLayer of the same contents."""

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, more: int) -> None:
        self.cumulative_length += more
        kept = self.sliding_window - 1
        self.keys, self.values = keys[:, :, -kept:], values[:, :, -kept:]


_GROWING: dict[type, type] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
}


def growing_layer(cache: Any, index: int) -> Any:
    """Layer ``index`` of a transformers Cache as one that grows in place, put there if need be; None if it is of another kind."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not 0 <= index < len(layers):
        return None
    layer = layers[index]
    if isinstance(layer, _Grows):
        return None if hf.records_past(layer) else layer
    kind = _GROWING.get(type(layer))
    if kind is None or hf.records_past(layer):
        return None
    grown: Any = object.__new__(kind)
    grown.take_over(layer)
    layers[index] = grown
    return grown
