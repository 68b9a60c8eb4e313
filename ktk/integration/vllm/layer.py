"""What vLLM says of a layer of experts, in ktk's words; what ktk does not run, and why.

Nothing here imports vLLM: its objects are looked at by their attributes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ktk.experts.activation import Activation
from ktk.experts.stored import ExpertWeights
from ktk.models.find import ACTIVATIONS
from ktk.ops.inputs import as_weights

_NO_GATE = "_no_mul"
# vLLM's name -> config.json's; the others that ktk has take the layer's own numbers.
_NAMES = {"gelu_tanh": "gelu_pytorch_tanh", "relu2_no_mul": "relu2"}
_INTERLEAVED = "swigluoai"  # gate and up take turns in the rows of w13


def refusal(layer: Any) -> str | None:
    """Why ktk does not run this layer as vLLM asks, or None.

    layer : vLLM's RoutedExperts.
    """
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    for name, asked in (
        ("enable_expert_parallel", parallel.use_ep),
        ("enable_eplb", parallel.enable_eplb),
        ("tensor_parallel_size", parallel.tp_size > 1),
        ("data_parallel_size", parallel.dp_size > 1),
        ("prefill_context_parallel_size", parallel.pcp_size > 1),
    ):
        if asked:
            return (
                f"{name}: quantization ktk runs each layer's experts in one process, which splits "
                "them over NUMA nodes by itself; leave it out"
            )
    if moe.is_lora_enabled:
        return "enable_lora: quantization ktk has no adapters in vLLM; leave it out"
    if layer.apply_router_weight_on_input:
        return "routing weights multiply the experts' input, which ktk has no kernel for"
    if moe.num_experts != moe.num_logical_experts:
        return "redundant or shared experts among the routed ones are not loaded"
    return None if activation_of(moe) else f"activation {moe.activation.value!r}: ktk has no kernel"


def activation_of(moe: Any) -> Activation | None:
    """ktk's activation for a FusedMoEConfig; None if there is none."""
    name, limit = moe.activation.value, moe.swiglu_limit
    if name in _NAMES:
        return ACTIVATIONS[_NAMES[name]]
    if name == "silu":
        return Activation.silu(limit or 0.0)
    if name == _INTERLEAVED:
        return Activation.swigluoai()
    if name == "swigluoai_uninterleave" and limit is not None:
        return Activation(
            alpha=1.0 if moe.swiglu_alpha is None else moe.swiglu_alpha,
            gate_max=limit,
            up_min=-limit,
            up_max=limit,
            up_offset=0.0 if moe.swiglu_beta is None else moe.swiglu_beta,
        )
    plain = name.removesuffix(_NO_GATE)
    if plain != name:
        return ACTIVATIONS.get(_NAMES.get(plain, plain))
    return None


def spec_fields(layer: Any) -> dict[str, Any]:
    """has_gate, has_bias and activation of a layer that is not refused, as MoESpec takes them."""
    moe = layer.moe_config
    return {
        "has_gate": moe.is_act_and_mul,
        "has_bias": moe.has_bias,
        "activation": activation_of(moe),
    }


def read_expert(layer: Any, expert: int) -> ExpertWeights:
    """One expert out of w13_weight (num_experts, gate|up rows, hidden_size), w2_weight
    (num_experts, hidden_size, intermediate_size) and their biases (num_experts, rows).
    """
    moe = layer.moe_config

    def halves(name: str) -> tuple[Any, Any]:
        """(gate's rows or None, up's)"""
        rows = getattr(layer, name)[expert]
        if not moe.is_act_and_mul:
            return None, rows
        if moe.activation.value == _INTERLEAVED:
            return rows[0::2], rows[1::2]
        half = len(rows) // 2
        return rows[:half], rows[half:]

    gate, up = (None if w is None else _array(w) for w in halves("w13_weight"))
    down = _array(layer.w2_weight[expert])
    assert up is not None
    if not moe.has_bias:
        return ExpertWeights(gate, up, down)
    biases = (*halves("w13_bias"), layer.w2_bias[expert])
    return ExpertWeights(gate, up, down, *(None if b is None else _floats(b) for b in biases))


def _array(rows: Any) -> np.ndarray:
    """float32, or bf16 bits, C-contiguous."""
    return as_weights(rows.detach().contiguous(), "an expert's weight")


def _floats(bias: Any) -> np.ndarray:
    values: np.ndarray = bias.detach().float().contiguous().numpy()
    if not math.isfinite(float(np.abs(values).max(initial=0.0))):
        raise ValueError("a bias holds NaN or inf: mend the checkpoint")
    return values
