"""Attention of a continuous batch on the CPU: each sequence by itself, so that no other one changes its bits.

transformers packs the sequences of a batch into one row. Its SDPA path then needs a mask of all queries by all keys, which
costs memory and time for what is masked, and changes a sequence's rounding with its neighbours. A registered implementation
whose name contains "flash" gets sequence lengths instead of masks; this one runs torch's SDPA once per sequence.

Reductions depend on nothing but a token's position: queries go in blocks that begin at multiples of BLOCK, with the keys up
to the block's end, those to come masked. So it does not matter how the scheduler cuts a prompt into chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.attention import one_row
from ktk.server.paged_cache import OwnRows

NAME = "ktk_flash_paged"
BLOCK = 64
# Rows that a batch is filled up to with copies of its last token. Measured with torch 2.13 on Zen 4: the rows of a
# matrix product have the same bits for any number of rows from 2 on in bf16 and from 4 on in fp32. Decoding one
# sequence, this costs 5 to 10 %.
MIN_ROWS = 4
MIN_ROWS_BF16 = 2
_IGNORED = {*hf.PLUMBING, "dropout", "is_causal"}


def pad_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a model: at least so many tokens and logits; the copies are dropped later."""
    bounds = hf.query_bounds(kwargs)
    if bounds is None:
        return None
    fewest = MIN_ROWS_BF16 if module.dtype == torch.bfloat16 else MIN_ROWS
    changed = {**kwargs, hf.BATCH_CACHE: OwnRows(kwargs[hf.BATCH_CACHE], int(bounds[-1]))}
    for name in hf.BATCH_ROWS:
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.shape[-1] < fewest:
            copies = value[..., -1:].expand(*value.shape[:-1], fewest - value.shape[-1])
            changed[name] = torch.cat([value, copies], -1)
    return args, changed


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
    """query (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim) -> (1, tokens, heads, head_dim).

    key, value : all that the tokens see, unless a cache is among the arguments, which then is to be updated here.
    s_aux : (heads,), logits of each head's sink. Raises ValueError for attention that may be more than this.
    """
    for name, given in kwargs.items():
        if name not in _IGNORED and given is not None:
            raise ValueError(f"attention has {name}")
    if kwargs.get("dropout") or kwargs.get("is_causal") is False:
        raise ValueError("attention has dropout, or sees what is to come")
    rows = query.shape[2]
    cache = hf.cache_in(kwargs)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    bounds, key_bounds = hf.query_bounds(kwargs).tolist(), hf.key_bounds(kwargs).tolist()
    own = bounds[-1]  # what follows are copies: see pad_rows
    parts = []
    for i in range(len(bounds) - 1):
        q = query[:, :, bounds[i] : bounds[i + 1]]
        k = key[:, :, key_bounds[i] : key_bounds[i + 1]]
        v = value[:, :, key_bounds[i] : key_bounds[i + 1]]
        if q.shape[2] == 1 and s_aux is None:
            parts.append(one_row(q, k, v, scaling))  # a window's cache has no older keys
        else:
            parts.append(_blocks(q, k, v, scaling, sliding_window, s_aux))
    if rows > own:
        parts.append(query.new_zeros(1, query.shape[1], rows - own, value.shape[-1]))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    count, length = q.shape[2], k.shape[2]
    first = length - count  # the first query's place among the keys
    filled = -(-length // BLOCK) * BLOCK
    k, v = F.pad(k, (0, 0, 0, filled - length)), F.pad(v, (0, 0, 0, filled - length))
    outs = []
    begin = first
    while begin < length:
        end = min(length, (begin // BLOCK + 1) * BLOCK)
        block = q[:, :, begin - first : end - first]
        short = max(0, MIN_ROWS - block.shape[2])
        if short:
            block = torch.cat([block, block[:, :, -1:].expand(-1, -1, short, -1)], 2)
        seen = (end + BLOCK - 1) // BLOCK * BLOCK
        places = torch.arange(begin, end + short).clamp(max=end - 1)[:, None]
        keys = torch.arange(seen)[None]
        mask = keys <= places
        if sliding_window is not None:
            mask &= keys > places - sliding_window
        own_k, own_v = k[:, :, :seen], v[:, :, :seen]
        if sinks is not None:
            own_k, own_v, mask = _with_sink(own_k, own_v, mask, sinks)
        out = F.scaled_dot_product_attention(
            block, own_k, own_v, attn_mask=mask, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        outs.append(out[:, :, : end - begin])
        begin = end
    return torch.cat(outs, 2)


def _with_sink(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sink as one more key of zeros, whose score is the sink's logit and whose value adds nothing.

    mask : bool (rows, keys). Returns k and v with keys + 1, and what is added to the scores, (1, heads, rows, keys + 1).
    """
    rows, keys = mask.shape
    added = k.new_zeros(1, len(sinks), rows, keys + 1)
    added[..., :keys].masked_fill_(~mask, float("-inf"))
    added[..., keys] = sinks[:, None]
    return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), added
