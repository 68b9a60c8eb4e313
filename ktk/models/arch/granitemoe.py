"""Granite 3 MoE: Mixtral's shape with four multipliers;
experts stacked as ``block_sparse_moe.{input,output}_linear``.
"""

from __future__ import annotations

from ktk.models.architecture import Architecture
from ktk.models.families import Fused
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rows import Fields, Key, WholeModel
from ktk.models.whole.source import Source


def _config(source: Source) -> Fields:
    heads, hidden = source.required("attention.head_count"), source.required("embedding_length")
    source.check_rotary(hidden // heads)
    source.check_all_have_experts("Granite MoE")
    return {
        "num_local_experts": source.num_experts,
        "intermediate_size": source.expert_width,
    }


def _metadata(fields: Fields) -> Fields:
    found = rows.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {**found, "feed_forward_length": found["expert_feed_forward_length"]}


NAMES = Fused(
    "granite",
    r"block_sparse_moe",
    {"input_linear.weight": "gate_up", "output_linear.weight": "down"},
)
WHOLE = WholeModel(
    "granitemoe",
    (
        Key("attention.head_count_kv", "num_key_value_heads"),
        Key("embedding_scale", "embedding_multiplier", float),
        Key("residual_scale", "residual_multiplier", float),
        Key("attention.scale", "attention_multiplier", float),
        Key("logit_scale", "logits_scaling", float),
    ),
    (
        *rows.WHOLE,
        *rows.NORMS,
        *rows.permuted_attention(),
        *rows.per_layer(
            "ffn_gate_inp",
            "block_sparse_moe.router",
            checkpoint="model.layers.{n}.block_sparse_moe.router.layer.weight",
        ),
    ),
    _config,
    _metadata,
)
GRANITE_MOE = Architecture(
    ("granitemoe",), (NAMES,), gguf=GgufArchitecture("granitemoe"), whole=WHOLE
)
