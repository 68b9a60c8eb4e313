"""Gradients through packed experts, whose weights stay as they are: for adapters on attention and
routers.

The backward pass computes what eager float experts with the dequantised weights would: in float32,
one expert at a time, its hidden layer computed again. The rounding of activations counts as the
identity (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ktk.experts.stored import ExpertWeights
from ktk.integration.transformers.activations import join_gate_up
from ktk.integration.transformers.experts import ExpertsHandle, has_post_norm, weight_names

# Rows of one expert at a time: bounds what the recomputed hidden layer takes.
_ROWS = 1024


class ExpertsFunction(torch.autograd.Function):
    """The experts' forward pass ``run`` with a backward pass.

    Inputs after the weights are the module's parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., torch.Tensor],
        module: Any,
        handle: ExpertsHandle,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, top_k_index, top_k_weights)
        ctx.module, ctx.handle = module, handle
        return run(module, handle, hidden_states, top_k_index, top_k_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        module, handle = ctx.module, ctx.handle
        frozen = [getattr(module, name) for name in weight_names(module)]
        if any(weight.requires_grad for weight in frozen):
            raise RuntimeError(
                "the weights of ktk experts are frozen and get no gradients: call "
                "requires_grad_(False) on them and "
                'train the rest, or train all with model.set_experts_implementation("eager")'
            )
        hidden, index, weights = ctx.saved_tensors
        trained = [p for p in module.parameters() if p.requires_grad]
        d_hidden, d_weights, d_trained = experts_backward(
            module, handle, hidden, index, weights, grad, trained
        )
        by_id = {id(p): d for p, d in zip(trained, d_trained, strict=True)}
        rest = [by_id.get(id(p)) for p in module.parameters()]
        return None, None, None, d_hidden, None, d_weights, *rest


def experts_backward(
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    grad: torch.Tensor,
    trained: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Gradients of hidden_states, top_k_weights and ``trained`` (of a norm behind the experts), in
    their dtypes.

    grad : (num_tokens, hidden_size), of the output.
    """
    x, g = hidden_states.detach().float().cpu(), grad.float().cpu()  # (tokens, H)
    ids, scale = top_k_index.cpu(), top_k_weights.detach().float().cpu()  # (tokens, top_k)
    d_x, d_scale = torch.zeros_like(x), torch.zeros_like(scale)
    d_trained = [torch.zeros_like(p) for p in trained]
    is_valid = (ids >= 0) & (ids < handle.moe.spec.num_experts)
    for expert in ids[is_valid].unique().tolist():
        weights = _as_tensors(handle.dequantised(expert))
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        for part, at in zip(token.split(_ROWS), slot.split(_ROWS), strict=True):
            rows = x[part].requires_grad_()
            with torch.enable_grad():
                y = _expert(module, weights, rows)  # (rows, H)
            d_scale[part, at] = (g[part] * y.detach()).sum(-1)
            d_y = g[part] * scale[part, at, None]
            d_rows, *more = torch.autograd.grad(y, [rows, *trained], d_y)
            d_x.index_add_(0, part, d_rows)
            for total, d in zip(d_trained, more, strict=True):
                total += d
    return d_x.to(hidden_states), d_scale.to(top_k_weights), d_trained


def _as_tensors(weights: ExpertWeights) -> dict[str, torch.Tensor | None]:
    return {
        name: None if array is None else torch.from_numpy(np.ascontiguousarray(array))
        for name, array in weights._asdict().items()
    }


def _expert(module: Any, w: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """One float expert on float32 (rows, H), with its bias and norm,
    by the module's own activation.
    """
    linear = torch.nn.functional.linear
    up = linear(x, w["up"], w["up_bias"])  # (rows, I)
    if module.has_gate:
        gate = linear(x, w["gate"], w["gate_bias"])
        act = module._apply_gate(join_gate_up(gate, up, module.is_concatenated))
    else:
        act = module.act_fn(up)
    y = linear(act.float(), w["down"], w["down_bias"])
    if has_post_norm(module):
        norm = module.post_expert_norm
        device = next((p.device for p in norm.parameters()), y.device)
        y = norm(y.to(device)).float().cpu()
    return y
