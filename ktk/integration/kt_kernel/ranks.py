"""Several ranks, one copy of the experts: rank 0 owns a layer's wrapper for fine-tuning, the others
have none. Every rank's tokens run there, and each rank gets its own rows back.

The adapters' gradients are the ranks' mean, as data-parallel training averages them; they exist on
rank 0 alone, where their optimiser steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ktk.integration.kt_kernel.sft import SftWrapper


def forward_of_ranks(
    wrapper: SftWrapper | None,
    hidden_states: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    group: Any = None,
) -> torch.Tensor:
    """The experts' weighted sum of this rank's tokens, in torch's graph.

    wrapper : on the group's rank 0, elsewhere None. hidden_states : (num_tokens, hidden_size), of
    one dtype on all ranks; each rank has its own number of tokens, 0 too. expert_ids, weights :
    (num_tokens, num_experts_per_tok). group : of torch.distributed; None: all ranks.
    All ranks call it, and backward, in the same order, and all with gradients or none. Their mean
    goes into the adapters' buffers of rank 0. Returns as hidden_states.
    Raises ValueError where a wrapper is missing or too many. An error on rank 0 leaves the others
    waiting until the group's time is out.
    """
    if (wrapper is None) == (dist.get_rank(group) == 0):
        raise ValueError(
            f"rank {dist.get_rank(group)} has {wrapper!r}: rank 0 owns the wrapper, the others "
            "give None"
        )
    # A rank whose inputs need no gradient takes part in backward all the same.
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
    is_saved = torch.is_grad_enabled()
    out: torch.Tensor = _OnRankZero.apply(
        hidden_states, weights, expert_ids, anchor, wrapper, group, is_saved
    )
    return out


class _OnRankZero(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        anchor: torch.Tensor,
        wrapper: SftWrapper | None,
        group: Any,
        is_saved: bool,
    ) -> torch.Tensor:
        counts = [0] * dist.get_world_size(group)
        dist.all_gather_object(counts, len(hidden_states), group)
        ctx.wrapper, ctx.group, ctx.counts = wrapper, group, counts
        ctx.top_k, ctx.weights_dtype = weights.shape[1], weights.dtype
        inputs = (hidden_states, expert_ids.to(torch.int64), weights.float())
        hidden, ids, scale = (_to_rank_zero(x.detach(), counts, group) for x in inputs)
        out = None
        if wrapper is not None:
            out = wrapper.forward(hidden, ids, scale, is_saved).to(hidden_states)
        return _from_rank_zero(out, hidden_states, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        counts, group = ctx.counts, ctx.group
        rows = _to_rank_zero(grad, counts, group)
        d_hidden = d_weights = None
        if ctx.wrapper is not None:
            d_hidden, d_weights = ctx.wrapper.backward(
                rows, grad.device, optimizer_grad_scale=1 / len(counts)
            )
            d_hidden = d_hidden.to(grad.dtype)
        d_hidden = _from_rank_zero(d_hidden, grad, counts, group)
        like = grad.new_empty(len(grad), ctx.top_k, dtype=torch.float32)
        d_weights = _from_rank_zero(d_weights, like, counts, group)
        return d_hidden, d_weights.to(ctx.weights_dtype), None, None, None, None, None


def _to_rank_zero(rows: torch.Tensor, counts: list[int], group: Any) -> torch.Tensor:
    """All ranks' rows one behind the other on rank 0, this rank's own elsewhere."""
    rows = rows.contiguous()
    if dist.get_rank(group):
        if len(rows):
            dist.send(_bytes(rows), dist.get_global_rank(_group(group), 0), group)
        return rows
    found = [rows]
    for rank in range(1, len(counts)):
        found.append(rows.new_empty(counts[rank], *rows.shape[1:]))
        if counts[rank]:
            dist.recv(_bytes(found[-1]), dist.get_global_rank(_group(group), rank), group)
    return torch.cat(found)


def _from_rank_zero(
    rows: torch.Tensor | None, like: torch.Tensor, counts: list[int], group: Any
) -> torch.Tensor:
    """This rank's part of what rank 0 has. like : of the part's shape, dtype and device."""
    if rows is None:
        own = torch.empty_like(like, memory_format=torch.contiguous_format)
        if len(own):
            dist.recv(_bytes(own), dist.get_global_rank(_group(group), 0), group)
        return own
    parts = rows.split(counts)
    for rank in range(1, len(counts)):
        if counts[rank]:
            to = dist.get_global_rank(_group(group), rank)
            dist.send(_bytes(parts[rank].contiguous()), to, group)
    return parts[0].clone()


def _group(group: Any) -> Any:
    return dist.group.WORLD if group is None else group


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """The same memory: not every transport takes every dtype."""
    return rows.view(torch.uint8)
