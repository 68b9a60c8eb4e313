"""The experts function "ktk": what transformers calls instead of an experts module's forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ktk.integration.transformers.activations import join_gate_up
from ktk.integration.transformers.adapters import LoraTensors, combined, hung_tensors
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    handle_of,
    has_post_norm,
    listener_of,
)
from ktk.integration.transformers.gradients import run_trained
from ktk.integration.transformers.packing import pack_module, source_key
from ktk.integration.transformers.trained_experts import trained_of

# Rows per step of the paths that keep one float32 row per (token, slot): bounds their memory.
_SLOT_TOKENS = 256


def ktk_experts_forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: Sequence[LoraTensors] = (),
) -> torch.Tensor:
    """What transformers calls instead of the module's forward.

    hidden_states : (num_tokens, hidden_size), on any device. top_k_index, top_k_weights :
    (num_tokens, top_k). adapters : of a module around this one, beside those that hang on it.
    Returns (num_tokens, hidden_size) in hidden_states' dtype and device. Gradients reach
    hidden_states, top_k_weights, adapters and a norm behind the experts; see ``gradients``.
    """
    handle = handle_of(module)
    if handle is None or (handle.sources is not None and handle.sources != source_key(module)):
        handle = pack_module(module)
    listener = listener_of(module)
    if listener is not None:
        listener(top_k_index, top_k_weights)
    lora = combined([*hung_tensors(module), *adapters])
    trained = trained_of(module)
    if trained is None:
        return _forward(module, handle, hidden_states, top_k_index, top_k_weights, lora)
    others = trained.others(top_k_index)
    out = _forward(module, handle, hidden_states, others, top_k_weights, lora)
    return trained.add_to(out, module, hidden_states, top_k_index, top_k_weights)


def _forward(
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: LoraTensors | None,
) -> torch.Tensor:
    """Of the packed experts and their adapters."""
    given = (hidden_states, top_k_index, top_k_weights)
    if lora is None and not _takes_gradients(module, hidden_states, top_k_weights):
        return run_experts(module, handle, *given)
    if has_post_norm(module):
        return _normed(module, handle, *given, lora)
    return run_trained(run_experts, module, handle, *given, lora)


def _takes_gradients(module: Any, *inputs: torch.Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in (*inputs, *module.parameters()))


def _normed(
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: LoraTensors | None,
) -> torch.Tensor:
    """Of a module that normalises each expert's output: each in a row of its own, in torch's graph
    from there on.
    """
    is_valid = (top_k_index >= 0) & (top_k_index < handle.moe.spec.num_experts)
    token, slot = torch.nonzero(is_valid, as_tuple=True)
    rows = hidden_states[token].float()
    ones = torch.ones(len(token), 1)
    ids = top_k_index[token, slot][:, None]
    y = run_trained(_run_rows, module, handle, rows, ids, ones, lora)  # (rows, H)
    y = module.post_expert_norm(y).float()
    by_slot = y.new_zeros(*top_k_index.shape, y.shape[1]).index_put((token, slot), y)
    scale = torch.where(is_valid, top_k_weights.float(), 0.0)
    out = sum(scale[:, k, None] * by_slot[:, k] for k in range(top_k_index.shape[1]))
    return out.to(hidden_states)


def _run_rows(
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """``run_experts`` before the norm: one row for each (token, slot)."""
    rows, experts = hidden_states.detach().cpu(), top_k_index.cpu()[:, 0]
    if handle.activation is None:
        y = _own_activation(module, handle, rows, experts)
    else:
        y = (handle.hybrid or handle.moe).forward(rows, experts[:, None], top_k_weights.cpu())
    return y.to(hidden_states)


def run_experts(
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """``ktk_experts_forward`` without a graph."""
    if handle.deferral is not None and handle.deferral[0].is_on():
        deferral, layer = handle.deferral
        return deferral.run(layer, handle, hidden_states, top_k_index, top_k_weights)
    if handle.hybrid is not None and not has_post_norm(module):
        result: torch.Tensor = handle.hybrid(hidden_states.detach(), top_k_index, top_k_weights)
        return result
    ids, weights = top_k_index.detach().cpu(), top_k_weights.detach().cpu()
    if handle.activation is not None and not has_post_norm(module):
        out: torch.Tensor = handle.moe.forward(hidden_states.detach().cpu(), ids, weights)
    else:
        steps = range(0, len(hidden_states), _SLOT_TOKENS)
        parts = [slice(start, start + _SLOT_TOKENS) for start in steps]
        rows = [
            _by_slot(module, handle, hidden_states[p].detach().cpu(), ids[p], weights[p])
            for p in parts
        ]
        out = torch.cat(rows) if rows else torch.empty(hidden_states.shape)
    return out.to(device=hidden_states.device, dtype=hidden_states.dtype)


def _by_slot(
    module: Any,
    handle: ExpertsHandle,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The same sum, one float32 row per (token, slot): for what happens between or after ktk's
    projections.

    Slots are added in top-k order, in float32.
    """
    valid = (ids >= 0) & (ids < handle.moe.spec.num_experts)
    token, slot = torch.nonzero(valid, as_tuple=True)
    out = torch.zeros(hidden.shape, dtype=torch.float32)  # (tokens, H)
    if not len(token):
        return out
    experts = ids[token, slot]  # (rows,)
    x = hidden[token].float()  # (rows, H)
    if handle.activation is not None:
        operator = handle.hybrid or handle.moe
        y = operator.forward(x, experts[:, None], torch.ones(len(x), 1))
    else:
        y = _own_activation(module, handle, x, experts)
    if has_post_norm(module):
        norm = module.post_expert_norm
        device = next((p.device for p in norm.parameters()), y.device)
        y = norm(y.to(device)).detach().float().cpu()
    by_slot = torch.zeros(*ids.shape, hidden.shape[1])  # (tokens, top_k, H)
    by_slot[token, slot] = y
    scale = torch.where(valid, weights.float(), 0.0)
    for k in range(ids.shape[1]):
        out += scale[:, k, None] * by_slot[:, k]
    return out


def _own_activation(
    module: Any, handle: ExpertsHandle, x: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    """ktk's projections around the module's own activation: float32 (rows, H) to float32 (rows,
    H).
    """
    moe, index = handle.moe, experts.numpy()
    # (rows, 2 I): gate, then up
    gate_up = torch.from_numpy(moe.linear("gate_up", x.numpy(), index))
    if moe.spec.has_bias:
        gate_up = gate_up + handle.biases()[0][experts]
    with torch.no_grad():
        if moe.spec.has_gate:
            gate, up = gate_up.chunk(2, dim=-1)
            act = module._apply_gate(join_gate_up(gate, up, module.is_concatenated))
        else:
            act = module.act_fn(gate_up)  # (rows, I)
    y = torch.from_numpy(moe.linear("down", act.detach().float().numpy(), index))
    return y + handle.biases()[1][experts] if moe.spec.has_bias else y
