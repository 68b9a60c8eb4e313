"""What a continuous batch's KV cache is given, whoever gives it: the model's attention modules
(transformers 5.24) or the attention function.

The cache has one geometry, number of heads and width, for keys and values of all layers, which
transformers reads from two fields of the config. Where attention is latent (DeepSeek) those mean
something else, and what is cached differs between releases. So two tokens are run with a cache that
only looks.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ktk.integration.transformers import names as hf

log = logging.getLogger("ktk")


class AnyWidth(hf.PagedAttentionCache):
    """A batch's cache in one forward pass, for keys and values of any width up to its own."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, heads, rows, width) of new tokens -> those of all tokens that they see, sequence by
        sequence.

        kwargs : the layer's; told where each sequence's keys begin.
        """
        widths = key_states.shape[-1], value_states.shape[-1]
        width = max(widths)  # the cache has one
        key, value = self._cache.update(
            key_states=F.pad(key_states, (0, width - widths[0])),
            value_states=F.pad(value_states, (0, width - widths[1])),
            layer_idx=layer_idx,
            kwargs=kwargs,
        )
        return key[..., : widths[0]], value[..., : widths[1]]


class _Shapes(hf.PagedAttentionCache):
    """Keeps nothing but the shapes of what it is given."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int]] = set()  # (heads, the wider of keys and values)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.add((key_states.shape[1], max(key_states.shape[-1], value_states.shape[-1])))
        kwargs.update(hf.bounds_of_keys(hf.query_bounds(kwargs)))
        return key_states, value_states


def cached_shapes(model: Any) -> set[tuple[int, int]]:
    """(heads, width) of what layers cache for a token;
    none if the model does not run that way at all.
    """
    shapes = _Shapes()

    def run() -> None:
        try:
            with torch.inference_mode():
                model(**hf.batch_inputs(torch.zeros(1, 2, dtype=torch.long), shapes))
        except (
            Exception
        ) as error:  # states instead of keys, or whatever it is: what runs it says why
            log.debug("%s in a batch of two tokens: %s", type(model).__name__, error)
            shapes.seen.clear()

    # In a thread that ends: the OpenMP team of one that stays spins beside the engine's.
    thread = threading.Thread(target=run, name="ktk-shapes")
    thread.start()
    thread.join()
    return shapes.seen


@contextlib.contextmanager
def cache_geometry(config: Any, heads: int, width: int) -> Iterator[None]:
    """While transformers makes its KV cache by a config, it finds this geometry there."""
    geometry = dict(zip(hf.CACHE_GEOMETRY, (heads, width), strict=True))
    before = {name: getattr(config, name, None) for name in geometry}
    for name, needed in geometry.items():
        setattr(config, name, needed)
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(config, name, own)
