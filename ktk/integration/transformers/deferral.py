"""Deferred experts in a model of transformers: a layer's least weighted ones add to the next layer.

output(n) = immediate experts of layer n + deferred experts of layer n - 1, of the input that each
had, added in float32 before the one rounding. They run on the CPU while the model computes what
lies between, which is worth it where that is done on a GPU. Which are deferred says
``ktk.ops.deferral.split``: of a batch only those that none of its tokens protects.

Only where the next layer has experts, too, so never in the last one nor before a dense one; only in
a pass through all layers, and without gradients. A device's experts are never deferred.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ktk import fork
from ktk.errors import BackendError
from ktk.experts.formats.floats import to_f32
from ktk.integration.transformers.decoder_layers import (
    FusedForward,
    decoder_layers,
    fuse_decoder_layers,
    fusion_report,
)
from ktk.integration.transformers.decoder_specs import DEFERRED
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    find_experts,
    handle_of,
    has_post_norm,
)
from ktk.integration.transformers.model_grid import holder_of_layers
from ktk.integration.transformers.sources import layer_of
from ktk.machine import queue as fifo
from ktk.ops.deferral import Deferred, split
from ktk.ops.inputs import as_call


class _Pass(threading.local):
    """The pass of the calling thread through a model that defers."""

    owner: Deferral | None = None
    deferred: Deferred | None = None


_pass = _Pass()


@fork.in_child
def _forget() -> None:
    """The thread that would compute it is not there."""
    _pass.owner = _pass.deferred = None


class Deferral:
    """A model's experts with up to ``most`` of each token's deferred.

    following : layer to whether the next one takes what it defers.
    """

    def __init__(self, most: int, following: Mapping[int, bool]) -> None:
        self.most, self.following = most, following

    def begin(self, *_: Any) -> None:
        """A pass begins. What an abandoned one left is dropped."""
        _pass.owner = None if torch.is_grad_enabled() else self
        _pass.deferred = None

    def end(self, _module: Any, _arguments: Any, output: Any) -> None:
        """BackendError if deferred experts were added nowhere. output : None if the pass failed."""
        lost, _pass.owner, _pass.deferred = _pass.deferred, None, None
        if lost is not None and output is not None:
            raise _lost(lost)

    def is_on(self) -> bool:
        """Whether this thread is in a pass of the model, without gradients."""
        return _pass.owner is self

    def run(
        self,
        layer: int,
        handle: ExpertsHandle,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """A layer's immediate experts and what was deferred to it, (num_tokens, hidden_size)."""
        size = handle.moe.spec.hidden_size
        call = as_call(hidden_states.detach(), topk_ids, topk_weights, size, None)
        before, _pass.deferred = _pass.deferred, None
        if before is not None and before.meant_for != (layer, *call.hidden.shape):
            raise _lost(before)
        add = None if before is None else before.ticket.take()
        ids, later = call.topk_ids, None
        if self.following.get(layer, False):
            ids, later = split(ids, call.topk_weights, ids.shape[1] - self.most)
            if handle.hybrid is not None:
                is_there = _named(handle.hybrid.mask, later)
                ids, later = np.where(is_there, later, ids), np.where(is_there, -1, later)
        weights = torch.from_numpy(call.topk_weights)
        if handle.hybrid is not None:
            given: Any = hidden_states.detach()
            out: torch.Tensor = handle.hybrid.forward(given, ids, weights, add=add)
        else:
            given = hidden_states.detach().cpu()
            out = handle.moe.forward(given, torch.from_numpy(ids), weights, add=add)
            out = out.to(hidden_states.device)
        if later is not None and (later >= 0).any():
            moe, scale = handle.moe, call.topk_weights.copy()
            x = np.array(to_f32(call.hidden))  # the caller may overwrite its own
            ticket = fifo.submit(lambda: moe.forward(x, later, scale))
            _pass.deferred = Deferred((layer + 1, *x.shape), ticket)
        return out

    def __deepcopy__(self, memo: dict[int, object]) -> Deferral:
        return self  # what is under way belongs to a thread, not to a copy of the model


def defer_experts(model: torch.nn.Module, most: int) -> int:
    """Have up to ``most`` experts of each token run with the next layer, of a model whose experts
    run on ktk; how many layers defer. 0: no more.

    ValueError for a negative number and where no layer can: two neighbours must have experts, with
    activations that ktk knows and without a norm of each expert's output.
    """
    if most < 0:
        raise ValueError(f"max_deferred_experts={most}: must be at least 0")
    named = dict(find_experts(model))
    handles = {layer_of(name): handle_of(module) for name, module in named.items()}
    plain = {
        layer_of(name)
        for name, module in named.items()
        if (handle := handle_of(module)) and handle.activation and not has_post_norm(module)
    }
    following = {layer: layer + 1 in plain for layer in plain}
    if most and not any(following.values()):
        raise ValueError(
            f"max_deferred_experts={most}: {type(model).__name__} has no two neighbouring layers "
            "whose experts ktk sums itself: leave it out"
        )
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()
    deferral = Deferral(most, following)
    for layer, found in handles.items():
        if found is not None:
            found.deferral = (deferral, layer) if most and layer in plain else None
    if most:
        owner = holder_of_layers(model, next(iter(named)))
        model.__dict__[_HOOKS] = [
            owner.register_forward_pre_hook(deferral.begin),
            owner.register_forward_hook(deferral.end, always_call=True),
        ]
    is_fused = any(isinstance(module.forward, FusedForward) for _, module in decoder_layers(model))
    if is_fused or DEFERRED in fusion_report(model).values():
        fuse_decoder_layers(model)  # one native call runs a layer's experts at once
    return sum(following.values()) if most else 0


_HOOKS = "_ktk_deferral_hooks"


def _named(mask: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """bool like ``ids``: where they are of the mask."""
    valid = (ids >= 0) & (ids < len(mask))
    return valid & mask[np.where(valid, ids, 0)]


def _lost(deferred: Deferred) -> BackendError:
    layer = deferred.meant_for[0]
    return BackendError(
        f"experts that layer {layer - 1} deferred were not added by layer {layer}, which did not "
        "run next with as many tokens: run all layers in their order, or without "
        "max_deferred_experts"
    )
