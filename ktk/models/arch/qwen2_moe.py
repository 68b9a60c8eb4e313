"""Qwen2-MoE: biases of q, k and v, shared experts with a gate of their own."""

from __future__ import annotations

from ktk.models.arch.names import MLP_EXPERTS
from ktk.models.arch.qwen3_moe import KEYS, config_of_experts, metadata
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rows import Fields, WholeModel
from ktk.models.whole.source import Source


def _config(source: Source) -> Fields:
    return {
        **config_of_experts(source),
        "qkv_bias": source.has("blk.{n}.attn_q.bias"),
        "shared_expert_intermediate_size": source.rows("blk.{n}.ffn_up_shexp.weight"),
    }


WHOLE = WholeModel(
    "qwen2_moe",
    KEYS,
    (
        *rows.WHOLE,
        *rows.NORMS,
        *rows.ATTENTION,
        *rows.DENSE,
        *rows.ROUTER,
        *rows.shared_experts("shared_expert"),
        *rows.per_layer("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ),
    _config,
    metadata,
)
QWEN2_MOE = Architecture(
    ("qwen2_moe",),
    (MLP_EXPERTS,),
    gguf=GgufArchitecture("qwen2moe", is_normalised=False),
    whole=WHOLE,
)
