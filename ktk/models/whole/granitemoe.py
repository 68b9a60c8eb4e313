"""Granite 3 MoE: Mixtral's shape with four multipliers."""

from __future__ import annotations

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Key, Source, WholeModel


def _config(source: Source) -> Fields:
    heads, hidden = source.required("attention.head_count"), source.required("embedding_length")
    base.check_rotary(source, hidden // heads)
    if dense := base.dense_layers(source):
        raise source.error(f"layers {dense} have no experts: Granite MoE has them in every layer")
    return {
        "num_local_experts": source.experts.spec(0).num_experts,
        "intermediate_size": base.expert_width(source),
    }


def _metadata(fields: Fields) -> Fields:
    found = base.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {**found, "feed_forward_length": found["expert_feed_forward_length"]}


GRANITE_MOE = WholeModel(
    "granitemoe",
    ("granitemoe",),
    (
        Key("attention.head_count_kv", "num_key_value_heads"),
        Key("embedding_scale", "embedding_multiplier", float),
        Key("residual_scale", "residual_multiplier", float),
        Key("attention.scale", "attention_multiplier", float),
        Key("logit_scale", "logits_scaling", float),
    ),
    (
        *base.WHOLE,
        *base.NORMS,
        *base.permuted_attention(),
        *base.per_layer(
            "ffn_gate_inp",
            "block_sparse_moe.router",
            checkpoint="model.layers.{n}.block_sparse_moe.router.layer.weight",
        ),
    ),
    _config,
    _metadata,
)
