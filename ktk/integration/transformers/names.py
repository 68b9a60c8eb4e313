"""Names inside transformers, 5.20 to 5.24 and on: keywords and attributes that ktk reads or passes and that no documentation promises.

A release may rename any of them, and one place must change then: here. Where releases differ, what is installed is looked at, a signature or an
attribute, never a version number. Code of a model's own (``trust_remote_code``) may be written for an older release than the
installed one: what a caller hands to ktk is understood under every name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache

__all__ = [
    "BATCH_CACHE",
    "BATCH_ROWS",
    "CACHE",
    "CACHE_GEOMETRY",
    "POSITIONS",
    "PagedAttentionCache",
    "batch_inputs",
    "bounds_of_keys",
    "cache_in",
    "key_bounds",
    "query_bounds",
    "takes",
]


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, not only ``**kwargs``."""
    return name in inspect.signature(function).parameters


# --- a decoder layer's forward pass ----------------------------------------------------------------------

_CACHE_NAMES = ("cache", "past_key_values")  # newest first
# What generate() and the models' forward take the KV cache by.
CACHE = next(name for name in _CACHE_NAMES if takes(GenerationMixin.prepare_inputs_for_generation, name))  # fmt: skip
POSITIONS = "position_embeddings"  # (cosines, sines)


def cache_in(named: Mapping[str, Any]) -> Any:
    """The KV cache among a forward's keyword arguments; None if there is none."""
    return next((named[name] for name in _CACHE_NAMES if named.get(name) is not None), None)


# --- a continuous batch's forward pass ---------------------------------------------------------------------

# Of one row for each token, or for each sequence whose next token is wanted.
BATCH_ROWS = ("input_ids", "position_ids", "logits_indices", "logits_to_keep")
BATCH_CACHE = "cache"  # in 5.20 to 5.23 beside past_key_values, for attention functions; since then the layers' own
CACHE_GEOMETRY = (
    "num_key_value_heads",
    "head_dim",
)  # the fields of a config by which a batch's KV cache is made
_QUERY_BOUNDS, _KEY_BOUNDS = "cu_seq_lens_q", "cu_seq_lens_k"


def query_bounds(named: Mapping[str, Any]) -> Any:
    """Where each sequence's tokens begin, and the last one's end; None if this is no continuous batch."""
    return named.get(_QUERY_BOUNDS)


def key_bounds(named: Mapping[str, Any]) -> Any:
    """Where each sequence's keys begin, and the last one's end, once the layer's cache is updated."""
    return named[_KEY_BOUNDS]


def bounds_of_keys(bounds: Any) -> dict[str, Any]:
    """What a cache's ``update`` tells ``key_bounds``."""
    return {_KEY_BOUNDS: bounds}


def batch_inputs(ids: torch.Tensor, cache: Any) -> dict[str, Any]:
    """A model's arguments for a batch of one new sequence. ids : (1, tokens)."""
    length = ids.shape[1]
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length)[None],
        _QUERY_BOUNDS: torch.tensor([0, length], dtype=torch.int32),
        BATCH_CACHE: cache,
        "use_cache": False,
    }
