"""What a wrapper for fine-tuning has of its layer: shapes, mask, and the weights, which are frozen.

The layer itself is a wrapper for inference. Backward reads the panels that forward reads: calls of
KT-Kernel's that make or save a second form of the weights do nothing, or say so.
"""

from __future__ import annotations

from typing import Any

from ktk.errors import BackendError
from ktk.integration.kt_kernel.block_fp8 import block_fp8_reader
from ktk.ops.moe import MoE


class SftWeights:
    """layer : a KTMoEWrapper for inference."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.layer_idx = layer.layer_idx
        self.num_experts = layer.num_experts
        self.num_experts_per_tok = layer.num_experts_per_tok
        self.hidden_size = layer.hidden_size
        self.moe_intermediate_size = layer.moe_intermediate_size
        # KT-Kernel's: whether its layers share a second copy of the weights. There is none here.
        self.share_backward_bb = False

    @property
    def gpu_experts_mask(self) -> Any:
        """As the wrapper for inference has it: change it in place, or assign."""
        return self._layer.gpu_experts_mask

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: Any) -> None:
        self._layer.gpu_experts_mask = mask

    @property
    def num_gpu_experts(self) -> int:
        return self._layer.num_gpu_experts

    @property
    def moe(self) -> MoE:
        """The operator. RuntimeError before the weights are loaded."""
        moe = self._layer.moe
        assert isinstance(moe, MoE)
        return moe

    def load_weights(
        self, physical_to_logical_map: Any = None, *, physical_to_logical_map_cpu: Any = None
    ) -> None:
        """As KTMoEWrapper.load_weights."""
        self._layer.load_weights(
            physical_to_logical_map, physical_to_logical_map_cpu=physical_to_logical_map_cpu
        )

    def load_weights_from_tensors(
        self,
        gate_proj: Any,
        up_proj: Any,
        down_proj: Any,
        physical_to_logical_map_cpu: Any = None,
    ) -> None:
        """As KTMoEWrapper.load_weights_from_tensors."""
        self._layer.load_weights_from_tensors(
            gate_proj, up_proj, down_proj, physical_to_logical_map_cpu
        )

    def load_block_fp8_weights(self, weights: Any, physical_to_logical_map: Any = None) -> None:
        """The layer from a block-fp8 checkpoint's own codes: kept as they are by fp8 methods,
        rounded anew by others.

        weights : KT-Kernel's BlockFP8ExpertWeights, see ``block_fp8_reader``.
        physical_to_logical_map : as ``KTMoEWrapper.load_weights_from_tensors`` takes it.
        Raises ValueError, TypeError naming what does not fit.
        """
        layer = self._layer
        sizes = (self.num_experts, self.hidden_size, self.moe_intermediate_size)
        read = block_fp8_reader(weights, *sizes)
        given = (physical_to_logical_map, layer.cpuinfer_threads, layer.kept())
        layer.use(layer.weights.from_reader(read, *given))

    def save_backward_weights_from_tensors(self, *weights: Any, **named: Any) -> None:
        """BackendError: there is no second form of the weights to write."""
        raise BackendError(
            "save_backward_weights_from_tensors: backward reads the panels that forward reads, so "
            "there is nothing to save; leave the call out, and write the packed layer with "
            "cpu_save=True or `ktk convert`"
        )

    def init_full_weight_grad_buffers(self, *weights: Any, **named: Any) -> None:
        """BackendError: packed weights have no gradients."""
        raise BackendError(
            f"init_full_weight_grad_buffers: the experts of layer {self.layer_idx} are packed and "
            "frozen; train adapters with init_lora_weights(), or chosen experts in full with "
            "ktk.train.train_experts()"
        )

    def update_base_weights(self) -> None:
        """Nothing changes: the experts' own weights are frozen. RuntimeError before they are
        loaded.
        """
        _ = self.moe

    def submit_backward_repack(self) -> None:
        """Nothing to do: backward reads the panels that forward reads."""

    wait_backward_repack = submit_backward_repack
