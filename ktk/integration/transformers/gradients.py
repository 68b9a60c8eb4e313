"""The experts' forward pass in torch's graph: gradients of hidden states, routing weights and
adapters, over ``ktk.ops.training``. The packed weights are frozen.

All that the backward pass needs is saved as tensors, so gradient checkpointing drops it and makes
it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ktk.errors import BackendError
from ktk.experts.lora import ExpertLora
from ktk.integration.transformers.adapters import LoraTensors
from ktk.integration.transformers.experts import ExpertsHandle, weight_names
from ktk.integration.transformers.own_gradients import own_backward
from ktk.ops import training
from ktk.ops.inputs import as_hidden, as_routing, to_numpy

_RECOMPUTED = "_ktk_recomputed"
Run = Callable[[Any, ExpertsHandle, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Call:
    """What one call runs beside its tensors.

    run : the experts' forward pass without a graph and without adapters. scaling, dropout, seed :
    as in ExpertLora. names : of the adapters' matrices.
    """

    run: Run
    module: Any
    handle: ExpertsHandle
    scaling: float
    dropout: float
    seed: int
    names: tuple[str, ...]

    def lora(self, matrices: tuple[torch.Tensor, ...]) -> ExpertLora | None:
        if not self.names:
            return None
        arrays = {n: to_numpy(m, n) for n, m in zip(self.names, matrices, strict=True)}
        return ExpertLora(**arrays, scaling=self.scaling, dropout=self.dropout, seed=self.seed)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        matrices: tuple[torch.Tensor, ...],
        is_saved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and ``training.Saved.z``."""
        given = (hidden_states, top_k_index, top_k_weights)
        lora = self.lora(matrices)
        if lora is None and (not is_saved or why_not_adapted(self.handle) is not None):
            return self.run(self.module, self.handle, *given), None
        x, ids, weights = (x.detach().cpu() for x in given)
        out, saved = training.forward(self.handle.moe, x, ids, weights, lora, is_saved=is_saved)
        return out.to(hidden_states), None if saved.z is None else torch.from_numpy(saved.z)


def recompute(module: Any, is_recomputed: bool) -> None:
    """Whether backward passes compute again what is before the activation of an experts module, or
    it is kept from the forward pass: float32 gate and up of each pair of token and expert.
    """
    module.__dict__[_RECOMPUTED] = is_recomputed


def run_trained(
    run: Run,
    module: Any,
    handle: ExpertsHandle,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: LoraTensors | None,
) -> torch.Tensor:
    """The experts' output, (num_tokens, hidden_size), in hidden_states' dtype and device, in
    torch's graph where it takes gradients.

    run : the same without a graph and without adapters.
    Raises BackendError where adapters cannot run, and says why.
    """
    seed = 0
    matrices: tuple[torch.Tensor, ...] = ()
    if adapters is not None:
        if (reason := why_not_adapted(handle)) is not None:
            raise BackendError(f"the experts have adapters, but {reason}")
        if adapters.dropout:  # of torch's generator, which gradient checkpointing sets back
            seed = int(torch.randint(1 << 32, (), dtype=torch.int64))
        matrices = tuple(map(_plain, adapters.matrices.values()))
    scaling, dropout = (adapters.scaling, adapters.dropout) if adapters else (1.0, 0.0)
    names = tuple(adapters.matrices) if adapters else ()
    call = Call(run, module, handle, scaling, dropout, seed, names)
    frozen = [getattr(module, name) for name in weight_names(module)]
    inputs = (hidden_states, top_k_weights, *matrices, *frozen)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out: torch.Tensor = ExpertsFunction.apply(
            call, hidden_states, top_k_index, top_k_weights, *matrices, *frozen
        )
        return out
    with torch.no_grad():
        return call.forward(hidden_states, top_k_index, top_k_weights, matrices, False)[0]


def why_not_adapted(handle: ExpertsHandle) -> str | None:
    """Why these experts cannot have adapters in their next call, None if they can."""
    if handle.activation is None:
        return "their activation is their module's own, through which ktk runs no adapters"
    if handle.hybrid is not None:
        return f"some of them are on {handle.hybrid.device}: load them all on the CPU"
    if handle.moe.is_streamed:
        return "they come into memory as tokens need them: load without a limit of expert memory"
    if handle.deferral is not None and handle.deferral[0].is_on():
        return "some of them are deferred to the next layer: switch that off"
    return None


def _plain(matrix: torch.Tensor) -> torch.Tensor:
    """On the CPU, float32 or bf16, in order; gradients find their way back."""
    is_taken = matrix.dtype in (torch.float32, torch.bfloat16)
    return matrix.to("cpu", matrix.dtype if is_taken else torch.float32).contiguous()


class ExpertsFunction(torch.autograd.Function):
    """The experts' forward pass with a backward pass.

    Inputs after the routing weights: the adapters' matrices, then the module's own parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.call = call
        matrices = parameters[: len(call.names)]
        given = (hidden_states, top_k_index, top_k_weights)
        is_saved = not call.module.__dict__.get(_RECOMPUTED, False)
        out, z = call.forward(*given, matrices, is_saved)
        ctx.save_for_backward(hidden_states, top_k_index, top_k_weights, z, *matrices)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        call: Call = ctx.call
        frozen = [getattr(call.module, name) for name in weight_names(call.module)]
        if any(weight.requires_grad for weight in frozen):
            raise RuntimeError(
                "the weights of ktk experts are frozen and get no gradients: call "
                "requires_grad_(False) on them and "
                'train the rest, or train all with model.set_experts_implementation("eager")'
            )
        hidden, index, weights, z, *matrices = ctx.saved_tensors
        if call.handle.activation is None:
            given = (hidden, index, weights, grad)
            d_hidden, d_weights = own_backward(call.module, call.handle, *given)
            d_matrices = []
        else:
            moe = call.handle.moe
            x = as_hidden(hidden.cpu(), moe.spec.hidden_size)
            ids, scale = as_routing(index.cpu(), weights.cpu(), len(x))
            lora = call.lora(tuple(matrices))
            saved = training.Saved(x, ids, scale, lora, None if z is None else z.numpy())
            found = training.backward(moe, saved, grad.cpu(), blocks=call.handle.blocks)
            d_hidden, d_weights = map(torch.from_numpy, found[:2])
            d_matrices = [torch.from_numpy(found.lora[name]) for name in call.names]
        d_matrices = [d.to(m) for d, m in zip(d_matrices, matrices, strict=True)]
        return (
            None,
            d_hidden.to(hidden),
            None,
            d_weights.to(weights),
            *d_matrices,
            *[None] * len(frozen),
        )
