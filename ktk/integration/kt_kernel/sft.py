"""KTMoEWrapper(mode="sft"): a layer's packed experts with adapters in the caller's memory, forward
and backward.

The calls are those of KT-Kernel's wrapper for fine-tuning. The layer itself (weights, mask,
threads) is a wrapper for inference; the arithmetic is ``ktk.ops.training``. Saved passes lie on a
stack, the last one's backward comes first.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
import torch

from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.experts.lora import MAX_RANK, ExpertLora
from ktk.integration.kt_kernel.arguments import checked_int
from ktk.integration.kt_kernel.checkpoint_output import CheckpointOutput
from ktk.integration.kt_kernel.optimizer_grads import OptimizerGrad, OptimizerGrads
from ktk.integration.kt_kernel.sft_arguments import (
    SftMethod,
    checked_number,
    checked_tensor,
    refuse_inference_only,
    registered,
)
from ktk.integration.kt_kernel.sft_weights import SftWeights
from ktk.machine import queue as fifo
from ktk.ops import training
from ktk.ops.inputs import as_hidden, as_routing, on_host, on_stream


def sft_wrapper(layer_type: type[Any], *args: Any, **arguments: Any) -> SftWrapper:
    """A wrapper for fine-tuning from KTMoEWrapper's arguments. layer_type : KTMoEWrapper.

    ValueError, TypeError as they are raised for inference, or naming what training does not have.
    """
    given = inspect.signature(layer_type).bind(*args, **arguments).arguments
    given.pop("mode", None)
    refuse_inference_only(given)
    adapters = {
        name: given.pop(name)
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "max_cache_depth")
        if given.get(name) is not None
    }
    method = SftMethod.of(given.pop("method", "AMXBF16_SFT"))
    return SftWrapper(layer_type(method=method.inference, **given), method, **adapters)


class _Inputs(NamedTuple):
    """Copies of a call's: hidden bf16 (num_tokens, hidden_size), int64 ids and float32 weights
    (num_tokens, top_k). device : the caller's.
    """

    hidden: torch.Tensor
    ids: np.ndarray
    weights: np.ndarray
    device: torch.device


class _Pending(NamedTuple):
    ticket: fifo.Ticket
    device: torch.device | None
    is_saved: bool = False


class SftWrapper(SftWeights):
    """One MoE layer's CPU experts with adapters: what KTMoEWrapper(mode="sft") gives.

    layer : a KTMoEWrapper for inference.
    lora_rank : 1 to 128. lora_alpha : adapters add alpha / rank times B A x.
    lora_dropout : of passes with ``save_for_backward``; the part of A's inputs that counts as zero.
    max_cache_depth : so many passes may be saved before their backward.

    Experts of ``gpu_experts_mask`` add zero and get no gradients. Calls of one wrapper come from
    one thread at a time.
    """

    def __init__(
        self,
        layer: Any,
        method: SftMethod,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
    ) -> None:
        super().__init__(layer)
        self.method = method.name
        self.lora_rank = checked_int("lora_rank", lora_rank)
        if self.lora_rank > MAX_RANK:
            raise ValueError(f"lora_rank={lora_rank}: must be at most {MAX_RANK}")
        self.lora_alpha = checked_number("lora_alpha", lora_alpha)
        self.lora_scaling = self.lora_alpha / self.lora_rank
        self.lora_dropout = checked_number("lora_dropout", lora_dropout, least=0)
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout={lora_dropout}: must be below 1")
        self.max_cache_depth = checked_int("max_cache_depth", max_cache_depth)
        self.checkpoint = CheckpointOutput()
        self._has_adapters = not method.is_without_lora
        self._lora: dict[str, np.ndarray] = {}  # bf16 bits: the caller's memory
        self._gradients: dict[str, np.ndarray] = {}
        self._optimizer_grads = OptimizerGrads(())
        self._is_accumulating = False
        self._saved: list[training.Saved] = []
        self._num_saved = 0
        self._forward: _Pending | None = None
        self._backward: _Pending | None = None

    # -- what it holds -------------------------------------------------------------------------

    @property
    def cache_depth(self) -> int:
        """Saved passes whose backward is still to come."""
        return len(self._saved)

    @property
    def lora_tensors(self) -> dict[str, torch.Tensor]:
        """The registered adapters' own memory, bfloat16: gate_lora_a, gate_lora_b, and so on.

        RuntimeError before init_lora_weights.
        """
        if not self._lora:
            raise RuntimeError(f"layer {self.layer_idx} has no adapters: init_lora_weights() first")
        return {
            "{}_lora_{}".format(*name.split("_")): torch.from_numpy(bits).view(torch.bfloat16)
            for name, bits in self._lora.items()
        }

    def __repr__(self) -> str:
        return (
            f"SftWrapper({self._layer!r}, rank {self.lora_rank}, {self.cache_depth} of "
            f"{self.max_cache_depth} passes saved)"
        )

    # -- weights -------------------------------------------------------------------------------

    def init_lora_weights(
        self,
        gate_lora_a: torch.Tensor,
        gate_lora_b: torch.Tensor,
        up_lora_a: torch.Tensor,
        up_lora_b: torch.Tensor,
        down_lora_a: torch.Tensor,
        down_lora_b: torch.Tensor,
        grad_gate_lora_a: torch.Tensor,
        grad_gate_lora_b: torch.Tensor,
        grad_up_lora_a: torch.Tensor,
        grad_up_lora_b: torch.Tensor,
        grad_down_lora_a: torch.Tensor,
        grad_down_lora_b: torch.Tensor,
    ) -> None:
        """Register the adapters and the buffers of their gradients; nothing is copied.

        All are bfloat16 on the CPU, contiguous. a : (num_experts, lora_rank, in_features); b :
        (num_experts, out_features, lora_rank). Each pass reads the adapters as they are then.
        Raises ValueError, TypeError naming the tensor, and changes nothing then.
        """
        weights = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        gradients = (
            grad_gate_lora_a,
            grad_gate_lora_b,
            grad_up_lora_a,
            grad_up_lora_b,
            grad_down_lora_a,
            grad_down_lora_b,
        )
        if not self._has_adapters:
            raise ValueError(f"method={self.method!r} has no adapters")
        sizes = (self.num_experts, self.hidden_size, self.moe_intermediate_size, self.lora_rank)
        lora = registered("{}_lora_{}", weights, *sizes)
        buffers = registered("grad_{}_lora_{}", gradients, *sizes)
        every = [*lora.values(), *buffers.values()]
        if len({array.ctypes.data for array in every}) < len(every):
            raise ValueError("two of the twelve tensors are the same memory")
        self._lora, self._gradients, self._is_accumulating = lora, buffers, False
        self._optimizer_grads = OptimizerGrads(gradients)
        for name, weight, view in zip(lora, weights, gradients, strict=True):
            if isinstance(weight, torch.nn.Parameter):
                self._optimizer_grads.register(name, weight, view)

    def register_authoritative_optimizer_grad(
        self, name: str, parameter: torch.nn.Parameter, grad_view: torch.Tensor
    ) -> None:
        """After each backward have a parameter's ``grad`` be a gradient's buffer, or a part of one.

        init_lora_weights does it for adapters that are nn.Parameter. With registered parameters
        backward adds where they have their ``grad``, and overwrites where all are None.
        Raises as ``OptimizerGrads.register``, and changes nothing then.
        """
        self._optimizer_grads.register(name, parameter, grad_view)

    @property
    def authoritative_optimizer_grads(self) -> tuple[OptimizerGrad, ...]:
        """What is registered."""
        return self._optimizer_grads.entries

    def validate_authoritative_optimizer_grad_state(self) -> str:
        """As ``OptimizerGrads.state``."""
        return self._optimizer_grads.state()

    def update_lora_weights(self) -> None:
        """After an optimiser's step: the next backward overwrites the gradients.

        The adapters themselves are read anew in each pass. Of registered parameters their ``grad``
        decides instead. Raises RuntimeError without weights or adapters.
        """
        self._check_ready()
        self._is_accumulating = False

    def release_authoritative_optimizer_grads(self) -> None:
        """The next backward overwrites the gradients instead of adding to them; registered
        parameters have no ``grad`` until then. RuntimeError while a backward is under way.
        """
        if self._backward is not None:
            raise RuntimeError("a backward is under way: call sync_backward first")
        self._optimizer_grads.state()
        self._optimizer_grads.release()
        self._is_accumulating = False

    # -- running -------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
        output_device: torch.device | None = None,
    ) -> torch.Tensor:
        """The experts' weighted sum, with adapters.

        hidden_states : (num_tokens, hidden_size), rounded to bfloat16. expert_ids : (num_tokens,
            num_experts_per_tok), any integer type; ids that are no expert add zero. weights :
            likewise, any float type. All are copied.
        Returns bfloat16 (num_tokens, hidden_size) on ``output_device``, None: the CPU.
        Raises RuntimeError before weights or adapters are there, or with max_cache_depth passes
        saved; TypeError / ValueError naming the argument.
        """
        self.submit_forward(hidden_states, expert_ids, weights, save_for_backward)
        return self.sync_forward(output_device)

    __call__ = forward

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> None:
        """Queue one pass and return; its arguments may be overwritten at once.

        Raises as forward, RuntimeError while another one waits for its sync.
        """
        self._check_ready()
        if self._forward is not None:
            raise RuntimeError("submit_forward twice: call sync_forward between them")
        if save_for_backward and self.cache_depth >= self.max_cache_depth:
            raise RuntimeError(
                f"{self.cache_depth} passes are saved, max_cache_depth={self.max_cache_depth}: "
                "call backward first, give save_for_backward=False, or clear_saved_forwards()"
            )
        inputs = self._copied(hidden_states, expert_ids, weights)
        lora = self._adapters(self.lora_dropout if save_for_backward else 0.0)
        moe, is_saved = self.moe, bool(save_for_backward)

        def task() -> tuple[torch.Tensor, training.Saved]:
            given = (inputs.hidden, inputs.ids, inputs.weights)
            return training.forward(moe, *given, lora, is_saved=is_saved)

        self._num_saved += is_saved
        self._forward = _Pending(fifo.submit(task), inputs.device, is_saved)

    def sync_forward(self, output_device: torch.device | None = None) -> torch.Tensor:
        """Wait for the last submit_forward; returns as forward.

        Raises RuntimeError without one, else what its pass raised.
        """
        pending, self._forward = self._forward, None
        if pending is None or pending.device is None:
            raise RuntimeError("sync_forward without submit_forward: nothing is under way")
        out, saved = pending.ticket.take()
        if pending.is_saved:
            self._saved.append(saved)
        result: torch.Tensor = out if output_device is None else out.to(output_device)
        return result

    def submit_forward_inference(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        cuda_stream: Any = None,
    ) -> None:
        """submit_forward for serving: nothing is saved. Inputs are copied behind the stream's work,
        and the copies wait.
        """
        with on_stream(str(hidden_states.device), cuda_stream):
            self.submit_forward(hidden_states, expert_ids, weights, save_for_backward=False)

    def sync_forward_inference(self, cuda_stream: Any = None) -> torch.Tensor:
        """sync_forward for serving: the result is where the hidden states were."""
        device = None if self._forward is None else self._forward.device
        with on_stream(str(device), cuda_stream):
            return self.sync_forward(device)

    def backward(
        self,
        grad_output: torch.Tensor,
        output_device: torch.device | None = None,
        optimizer_grad_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the last saved pass, which is dropped.

        grad_output : (num_tokens, hidden_size), of that pass. optimizer_grad_scale : what the
            adapters' gradients are multiplied by.
        Returns those of hidden states, bfloat16 (num_tokens, hidden_size), and of weights, float32
        (num_tokens, num_experts_per_tok), on ``output_device``, None: the CPU. The adapters' go
        into the registered buffers: the first backward after init_lora_weights, update_lora_weights
        or release_authoritative_optimizer_grads overwrites them, later ones add in float32 and
        round once. Experts without tokens have exactly zero.
        Raises RuntimeError without a saved pass, ValueError / TypeError naming the argument.
        """
        self.submit_backward_async(grad_output, output_device, optimizer_grad_scale)
        return self.sync_backward()

    def submit_backward_async(
        self,
        grad_output: torch.Tensor,
        output_device: torch.device | None = None,
        optimizer_grad_scale: float = 1.0,
    ) -> None:
        """Queue backward and return; grad_output may be overwritten at once."""
        if self._backward is not None:
            raise RuntimeError("submit_backward_async twice: call sync_backward between them")
        if not self._saved:
            raise RuntimeError(
                "backward without a saved pass: call forward(save_for_backward=True) first"
            )
        scale = np.float32(checked_number("optimizer_grad_scale", optimizer_grad_scale))
        saved = self._saved[-1]
        bits = as_hidden(
            checked_tensor("grad_output", grad_output).detach().cpu(), self.hidden_size
        )
        if bits.shape != saved.hidden.shape:
            raise ValueError(
                f"grad_output has shape {bits.shape}: must be that of the last saved pass, "
                f"{saved.hidden.shape}"
            )
        state = self._optimizer_grads.state()
        is_added = self._is_accumulating if state == "empty" else state == "open"
        copied = bits.copy()
        grad = torch.from_numpy(copied)
        grad = grad.view(torch.bfloat16) if copied.dtype == np.uint16 else grad
        self._saved.pop()
        moe, buffers = self.moe, self._gradients

        def task() -> tuple[torch.Tensor, torch.Tensor]:
            found = training.backward(moe, saved, grad)
            for name, gradient in found.lora.items():
                values = gradient * scale
                if is_added:
                    values += bf16_to_f32(buffers[name])
                buffers[name][...] = f32_to_bf16(values)
            d_hidden = torch.from_numpy(found.hidden).to(torch.bfloat16)
            return d_hidden, torch.from_numpy(found.topk_weights)

        self._is_accumulating = self._has_adapters
        self._backward = _Pending(fifo.submit(task), output_device)

    def sync_backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for submit_backward_async; returns as backward.

        Raises RuntimeError without one, else what it raised; the gradients are overwritten by the
        next one then, and the checkpoint's output is poisoned.
        """
        pending, self._backward = self._backward, None
        if pending is None:
            raise RuntimeError("sync_backward without submit_backward_async: nothing is under way")
        try:
            d_hidden, d_weights = pending.ticket.take()
        except BaseException:
            self._is_accumulating = False
            self._optimizer_grads.release()
            self.checkpoint.poison()
            raise
        self._optimizer_grads.publish()
        if pending.device is None:
            return d_hidden, d_weights
        return d_hidden.to(pending.device), d_weights.to(pending.device)

    def clear_saved_forwards(self) -> None:
        """Drop the saved passes: of a batch that is given up."""
        self._saved.clear()

    # -- checks --------------------------------------------------------------------------------

    def _check_ready(self) -> None:
        _ = self.moe
        if self._has_adapters and not self._lora:
            _ = self.lora_tensors

    def _adapters(self, dropout: float) -> ExpertLora | None:
        if not self._has_adapters:
            return None
        seed = (self.layer_idx * 0x9E3779B9 + self._num_saved) % (1 << 32)
        return ExpertLora(
            **self._lora, scaling=self.lora_scaling, dropout=dropout, seed=seed if dropout else 0
        )

    def _copied(self, hidden_states: Any, expert_ids: Any, weights: Any) -> _Inputs:
        hidden = checked_tensor("hidden_states", hidden_states)
        bits = as_hidden(hidden.detach().cpu(), self.hidden_size)
        ids, floats = as_routing(on_host(expert_ids), on_host(weights), len(bits))
        if ids.shape[1] != self.num_experts_per_tok:
            raise ValueError(
                f"expert_ids has {ids.shape[1]} experts per token: the wrapper was made for "
                f"num_experts_per_tok={self.num_experts_per_tok}; fill unused slots with id -1"
            )
        kept = hidden.detach().to("cpu", torch.bfloat16, copy=True).contiguous()
        is_expert = (ids >= 0) & (ids < self.num_experts)
        skipped = self.gpu_experts_mask.numpy()[np.where(is_expert, ids, 0)]
        ids = np.where(is_expert & ~skipped, ids, -1)
        return _Inputs(kept, ids, floats.copy(), hidden.device)
