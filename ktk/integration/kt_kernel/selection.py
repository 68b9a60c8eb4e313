"""Which of a batch's experts are put off to the next layer: KT-Kernel's static call for it."""

from __future__ import annotations

import sys
from typing import Any

from ktk.ops.deferral import split
from ktk.ops.inputs import as_routing, device_of, on_host


def select_deferred_experts(expert_ids: Any, scores: Any, protected_k: int) -> tuple[Any, Any]:
    """Split each token's experts into those to run now and those to run with the next layer.

    expert_ids : any integer type (num_tokens, top_k); scores : any float type, likewise.
    The protected_k best scores of every token are collected over the whole batch: an expert
    that one token protects runs now for all of them. So a token defers at most top_k -
    protected_k experts, often fewer in a bigger batch. The GPU mask is not looked at; an id of
    -1 stays -1 in both.
    Returns (immediate_ids, deferred_ids), int64 (num_tokens, top_k), -1 where the other has the
    expert.
    """
    device = device_of(expert_ids)
    host = on_host(expert_ids)
    rows = host.shape[0] if getattr(host, "ndim", 0) else 0
    ids, weights = as_routing(host, on_host(scores), rows)
    pair = split(ids, weights, protected_k)
    if device == "numpy":
        return pair
    torch = sys.modules["torch"]
    return torch.from_numpy(pair[0]).to(device), torch.from_numpy(pair[1]).to(device)
