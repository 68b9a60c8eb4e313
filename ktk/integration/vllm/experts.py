"""A layer's routed experts in vLLM: loaded by vLLM, packed when the layer is whole, run by ktk.

vLLM's online quantisation is what hands over a layer when its last weight has come; the float
weights are let go before the next layer's are read. Where experts lie packed none are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.models.utils import extract_layer_index

from ktk import backends, env
from ktk.checkpoint.packed import read_layer
from ktk.errors import CheckpointError
from ktk.experts.stored import StoredExperts
from ktk.integration.vllm.layer import read_expert, refusal, spec_fields
from ktk.integration.vllm.options import Options
from ktk.ops.moe import MoE
from ktk.quantise.pack import pack_experts

_WEIGHTS = ("w13_weight", "w2_weight", "w13_bias", "w2_bias")


class KtkExpertsMethod(OnlineMoEMethodBase):
    """Packs and runs one layer.

    directory : of the model; packed layers are read from it. Raises ValueError for a layer that ktk
    does not run, BackendError if no kernel runs the format here.
    """

    supports_eplb = False  # experts stay where they were packed

    def __init__(self, layer: RoutedExperts, options: Options, directory: str | None) -> None:
        super().__init__(layer.moe_config)
        if reason := refusal(layer):
            raise ValueError(f"{layer.layer_name}: {reason}")
        self.options = options
        self.directory = directory
        self.uses_meta_device = not options.is_packed
        self.moe_operator: MoE | None = None

    def create_weights(
        self, layer: RoutedExperts, num_experts: int, *sizes: Any, **attributes: Any
    ) -> None:
        if not self.options.is_packed:
            spec = self.options.spec(*self._shape(), **spec_fields(layer))
            backends.select(self.options.method, spec)  # refuse before the long part
            super().create_weights(layer, num_experts, *sizes, **attributes)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        threads = self.options.num_threads or env.num_threads() or torch.get_num_threads()
        experts = self._read(layer) if self.options.is_packed else self._pack(layer, threads)
        self.moe_operator = None  # of weights that were loaded before: its memory is free now
        self.moe_operator = MoE(experts, method=self.options.method, num_threads=threads)
        layer._already_called_process_weights_after_loading = True

    def _shape(self) -> tuple[int, int, int]:
        return (
            self.moe.num_local_experts,
            self.moe.hidden_dim,
            self.moe.intermediate_size_per_partition,
        )

    def _pack(self, layer: RoutedExperts, threads: int) -> StoredExperts:
        spec = self.options.spec(*self._shape(), **spec_fields(layer))
        packed = pack_experts(spec, partial(read_expert, layer), threads)
        for name in _WEIGHTS:
            if (weight := getattr(layer, name, None)) is not None:
                weight.data = torch.empty(0, dtype=weight.dtype)
        return packed

    def _read(self, layer: RoutedExperts) -> StoredExperts:
        number = extract_layer_index(layer.layer_name)
        packed = read_layer(self.directory or "", number)
        fields = spec_fields(layer)
        found = (packed.spec.num_experts, packed.spec.hidden_size, packed.spec.intermediate_size)
        wanted = (*self._shape(), fields["has_gate"], fields["has_bias"])
        if (*found, packed.spec.has_gate, packed.spec.has_bias) != wanted:
            raise CheckpointError(
                f"{self.directory}: layer {number} holds {found} (experts, hidden, intermediate "
                f"size), the model asks for {wanted[:3]}"
            )
        spec = dataclasses.replace(packed.spec, activation=fields["activation"])
        return dataclasses.replace(packed, spec=spec)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The routed experts' sum, like x (num_tokens, hidden_size); vLLM runs the shared ones."""
        run: Callable[..., torch.Tensor] = torch.ops.ktk.vllm_experts
        return run(x, topk_weights, topk_ids, layer.layer_name)


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    runner = get_forward_context().no_compile_layers[layer_name]
    moe: MoE = runner.routed_experts.quant_method.moe_operator
    result: torch.Tensor = moe.forward(x, topk_ids, topk_weights)
    return result


def _like(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    return torch.empty_like(x)


# One operator that torch.compile does not look into.
_library = torch.library.Library("ktk", "FRAGMENT")
_library.define(
    "vllm_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor"
)
_library.impl("vllm_experts", _experts, "CPU")
_library._register_fake("vllm_experts", _like)
