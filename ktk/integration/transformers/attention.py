"""Attention of one new token: torch's SDPA with the query heads of a key-value head as its rows.

For a single row of bf16 queries torch 2.13 takes 1.7 ms a layer on a CPU (32 heads, 4 key-value
heads, 512 keys); with the 8 heads that share keys as 8 rows the same kernel takes 0.1 ms.

The implementation keeps its name, "sdpa": models ask for the name to choose what they compute.
DeepSeek V3.2 masks what its index did not choose under "eager" and "sdpa" alone. So transformers'
function of that name is replaced by one that does the same for every module, except that of a model
given to ``use_attention`` rows without a mask come out faster.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ktk.integration.transformers import names as hf

NAME = "sdpa"
_MARK = "_ktk_decodes_rows"
# Parameters of transformers' function that one row without a mask has no use for. Any other that is
# given may mean something.
_PLAIN = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "dropout",
    "scaling",
    "is_causal",
    "kwargs",
}
_SPECIAL = {*inspect.signature(hf.sdpa_attention_forward).parameters} - _PLAIN | {
    *hf.MORE_ATTENTION
}


def one_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of a newest token, which sees every key.

    query : (batch, heads, 1, head_dim). key, value : (batch, kv_heads, keys, head_dim). Returns
        (batch, heads, 1, value's head_dim).
    """
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return out.reshape(batch, heads, 1, value.shape[-1])


class _OneRowFirst:
    """What transformers calls for "sdpa": what it called before,
    except for one row without a mask of a marked module.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        is_plain = query.shape[2] == 1 and attention_mask is None and query.device.type == "cpu"
        if not is_plain or dropout or _MARK not in module.__dict__:
            return self.own(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **kwargs,
            )
        if any(kwargs.get(name) is not None for name in _SPECIAL):
            return self.own(module, query, key, value, None, scaling=scaling, **kwargs)
        return one_row(query, key, value, scaling).transpose(1, 2).contiguous(), None


def use_attention(model: Any) -> bool:
    """Have a transformers model decode by ``one_row`` if it runs SDPA on a CPU; whether it does."""
    config = model.config.get_text_config()
    if hf.attention_implementation(config) != NAME or model.device.type != "cpu":
        return False
    own = hf.ALL_ATTENTION_FUNCTIONS[NAME]
    if not isinstance(own, _OneRowFirst):
        hf.ALL_ATTENTION_FUNCTIONS[NAME] = _OneRowFirst(own)
    for module in model.modules():
        module.__dict__[_MARK] = True
    return True
