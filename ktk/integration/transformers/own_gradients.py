"""Gradients through packed experts whose activation only the module itself computes.

The backward pass computes what eager float experts with the dequantised weights would: in float32,
one expert at a time, its hidden layer computed again by torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ktk.experts.stored import ExpertWeights
from ktk.integration.transformers.activations import join_gate_up
from ktk.integration.transformers.experts import ExpertsHandle

# Rows of one expert at a time: bounds what the recomputed hidden layer takes.
_ROWS = 1024


def own_backward(
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 gradients of hidden_states and top_k_weights, on the CPU.

    grad : (num_tokens, hidden_size), of the output.
    """
    x, g = hidden_states.float().cpu(), grad.float().cpu()  # (tokens, H)
    ids, scale = top_k_index.cpu(), top_k_weights.float().cpu()  # (tokens, top_k)
    d_x, d_scale = torch.zeros_like(x), torch.zeros_like(scale)
    is_valid = (ids >= 0) & (ids < handle.moe.spec.num_experts)
    for expert in ids[is_valid].unique().tolist():
        weights = _as_tensors(handle.dequantised(expert))
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        for part, at in zip(token.split(_ROWS), slot.split(_ROWS), strict=True):
            rows = x[part].requires_grad_()
            with torch.enable_grad():
                y = _expert(module, weights, rows)  # (rows, H)
            d_scale[part, at] = (g[part] * y.detach()).sum(-1)
            (d_rows,) = torch.autograd.grad(y, [rows], g[part] * scale[part, at, None])
            d_x.index_add_(0, part, d_rows)
    return d_x, d_scale


def _as_tensors(weights: ExpertWeights) -> dict[str, torch.Tensor | None]:
    return {
        name: None if array is None else torch.from_numpy(np.ascontiguousarray(array))
        for name, array in weights._asdict().items()
    }


def _expert(module: Any, w: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """One float expert on float32 (rows, H), with its bias, by the module's own activation."""
    linear = torch.nn.functional.linear
    up = linear(x, w["up"], w["up_bias"])  # (rows, I)
    if module.has_gate:
        gate = linear(x, w["gate"], w["gate_bias"])
        act = module._apply_gate(join_gate_up(gate, up, module.is_concatenated))
    else:
        act = module.act_fn(up)
    return linear(act.float(), w["down"], w["down_bias"])
