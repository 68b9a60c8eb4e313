"""transformers' cache layers whose keys and values grow in place (``ktk.kv.layers``)."""

from __future__ import annotations

from typing import Any

import torch

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.names import DynamicLayer, DynamicSlidingWindowLayer
from ktk.kv.layers import GrowingRows
from ktk.kv.sizes import TokenShape


class _Grows:
    """``update`` without torch.cat, for transformers' growing cache layers."""

    keys: Any
    values: Any

    def take_over(self, layer: Any) -> None:
        """Become what ``layer`` is."""
        self.__dict__.update(layer.__dict__)
        self._key_rows, self._value_rows = GrowingRows(), GrowingRows()

    def _with_room(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:  # type: ignore[attr-defined]
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        more = key_states.shape[-2]
        keys = self._key_rows.with_room(self.keys, key_states, more)
        return keys, self._value_rows.with_room(self.values, value_states, more)

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
        keys, values = self.keys, self.values
        return (
            self._key_rows.with_room(keys, keys, 1),
            self._value_rows.with_room(values, values, 1),
        )

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
    """Layer ``index`` of a transformers Cache as one that grows in place, put there if need be;
    None if it is of another kind.
    """
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


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token; 1 for a model that keeps none."""
    text = model.config.get_text_config().to_dict()
    return max(1, TokenShape.of_config(text).num_bytes(model.dtype.itemsize))
