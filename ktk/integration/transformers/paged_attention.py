"""Attention of a continuous batch on the CPU: each sequence by itself, so that no other one changes
its bits.

transformers packs the sequences of a batch into one row. Its SDPA path then needs a mask of all
queries by all keys, which costs memory and time for what is masked, and changes a sequence's
rounding with its neighbours. A registered implementation whose name contains "flash" gets sequence
lengths instead of masks; this one runs torch's SDPA once per sequence.

The bits of a token depend on its place in its sequence and on whether the prompt has it, and on
nothing else. The prompt's queries go in blocks of BLOCK, from multiples of BLOCK on, always that
many, with the keys up to the block's end, those to come masked: so it does not matter how the
scheduler cuts a prompt into chunks, down to single tokens. Tokens of the answer go one by one, as
they come, also where a sequence that was put off is read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.attention import one_row
from ktk.integration.transformers.paged_cache import AnyWidth

NAME = "ktk_flash_paged"
BLOCK = 64
_SPANS = "ktk_spans"
_IGNORED = {*hf.PLUMBING, _SPANS, "dropout", "is_causal"}


@dataclass(frozen=True)
class Span:
    """What a batch has of one sequence: its tokens from ``first`` on.

    prompt : the length of its prompt.
    """

    first: int
    prompt: int


class BatchHook:
    """Forward pre-hook of a model: tells attention about the sequences of the batch, and lets the
    cache take keys and values of any width.

    spans : of the next batch, in its order.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if hf.query_bounds(kwargs) is None:
            return None
        cache = AnyWidth(kwargs[hf.BATCH_CACHE])
        return args, {**kwargs, hf.BATCH_CACHE: cache, _SPANS: self.spans}


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim) -> (1,
    tokens, heads, head_dim).

    key, value : all that the tokens see, unless a cache is among the arguments, which then is to be
        updated here.
    s_aux : (heads,), logits of each head's sink. Raises ValueError for attention that may be more
        than this.
    """
    for name, given in kwargs.items():
        if name not in _IGNORED and given is not None:
            raise ValueError(f"attention has {name}")
    if kwargs.get("dropout") or kwargs.get("is_causal") is False:
        raise ValueError("attention has dropout, or sees what is to come")
    cache = hf.cache_in(kwargs)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    bounds, key_bounds = hf.query_bounds(kwargs).tolist(), hf.key_bounds(kwargs).tolist()
    own = _Attention(scaling, sliding_window, s_aux)
    parts = []
    for i, span in enumerate(kwargs.get(_SPANS) or [Span(0, bounds[-1])]):
        q = query[:, :, bounds[i] : bounds[i + 1]]
        k = key[:, :, key_bounds[i] : key_bounds[i + 1]]
        v = value[:, :, key_bounds[i] : key_bounds[i + 1]]
        in_prompt = min(max(0, span.prompt - span.first), q.shape[2])
        answered = q.shape[2] - in_prompt
        if in_prompt:
            seen = k.shape[2] - answered
            parts.append(
                own.blocks(q[:, :, :in_prompt], k[:, :, :seen], v[:, :, :seen], span.first)
            )
        for row in range(in_prompt, q.shape[2]):
            end = k.shape[2] - q.shape[2] + row + 1
            begin = max(0, end - sliding_window) if sliding_window else 0
            parts.append(own.newest(q[:, :, row : row + 1], k[:, :, begin:end], v[:, :, begin:end]))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Attention:
    """A layer's. scaling : None for one by the root of the width. sinks : (heads,) or None."""

    scaling: float | None
    window: int | None
    sinks: torch.Tensor | None

    def blocks(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int) -> torch.Tensor:
        """Of tokens that follow each other, the first at place ``first``; k, v :
        up to the last one's, from any place that they all see.
        """
        end = first + q.shape[2]
        low = self._lowest(first)  # the place of the first key that is looked at
        before, filled = end - k.shape[2] - low, -(-end // BLOCK) * BLOCK
        k = F.pad(k, (0, 0, before, filled - end))  # before < 0 cuts
        v = F.pad(v, (0, 0, before, filled - end))
        outs = []
        while first < end:
            begin = first // BLOCK * BLOCK  # of the block
            last = min(end, begin + BLOCK)
            rows = q[:, :, q.shape[2] - (end - first) : q.shape[2] - (end - last)]
            rows = F.pad(rows, (0, 0, first - begin, begin + BLOCK - last))
            keys = slice(self._lowest(first) - low, begin + BLOCK - low)
            out = self._block(rows, k[:, :, keys], v[:, :, keys], begin)
            outs.append(out[:, :, first - begin : last - begin])
            first = last
        return torch.cat(outs, 2)

    def _lowest(self, first: int) -> int:
        """Where the keys begin that a block looks at, by a place in it: a multiple of BLOCK."""
        if self.window is None:
            return 0
        return max(0, (first // BLOCK * BLOCK - self.window + 1) // BLOCK * BLOCK)

    def _block(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: int) -> torch.Tensor:
        """q : (1, heads, BLOCK, width), from place ``begin`` on; k, v : up to the block's end."""
        places = torch.arange(begin, begin + BLOCK)[:, None]
        keys = torch.arange(begin + BLOCK - k.shape[2], begin + BLOCK)[None]
        mask = keys <= places
        if self.window is not None:
            mask &= keys > places - self.window
        if self.sinks is not None:
            k, v, mask = _with_sink(k, v, mask, self.sinks[:, None, None])
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scaling, enable_gqa=k.shape[1] != q.shape[1]
        )

    def newest(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of a token that sees all keys."""
        if self.sinks is None:
            return one_row(q, k, v, self.scaling)
        groups = q.reshape(1, k.shape[1], -1, q.shape[-1])  # the heads that share keys as rows
        sinks = self.sinks.view(k.shape[1], -1, 1)
        k, v, mask = _with_sink(k, v, torch.ones(1, k.shape[2], dtype=torch.bool), sinks)
        out = F.scaled_dot_product_attention(groups, k, v, attn_mask=mask, scale=self.scaling)
        return out.reshape(1, q.shape[1], 1, v.shape[-1])


def _with_sink(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sink as one more key of zeros, whose score is the sink's logit and whose value adds
    nothing.

    mask : bool (rows, keys). sinks : (heads, rows or 1, 1). Returns k and v with keys + 1, and what
        is added to the scores, (1, heads, rows, keys + 1).
    """
    keys, rows = mask.shape[1], max(len(mask), sinks.shape[1])
    added = k.new_zeros(1, len(sinks), rows, keys + 1)
    added[..., :keys].masked_fill_(~mask, float("-inf"))
    added[..., keys:] = sinks
    return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), added
