"""Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Key, Source, WholeModel

KEYS = (*base.GROUPED_KEYS, Key("feed_forward_length", "intermediate_size"))
SHARED_GATE = base.per_layer("ffn_gate_inp_shexp", "mlp.shared_expert_gate")


def _config(source: Source) -> Fields:
    fields: Fields = {
        "num_experts": source.experts.spec(source.experts.layers[0]).num_experts,
        "moe_intermediate_size": base.expert_width(source),
        "norm_topk_prob": bool(source.experts.routing.expert_weights_norm),
        "mlp_only_layers": base.dense_layers(source),
        "decoder_sparse_step": 1,
    }
    heads, hidden = source.required("attention.head_count"), source.required("embedding_length")
    base.check_rotary(source, source.get("attention.key_length") or hidden // heads)
    return fields


def _qwen2(source: Source) -> Fields:
    return {
        **_config(source),
        "qkv_bias": source.has("blk.{n}.attn_q.bias"),
        "shared_expert_intermediate_size": source.rows("blk.{n}.ffn_up_shexp.weight"),
    }


def _qwen3(source: Source) -> Fields:
    return {**_config(source), "attention_bias": source.has("blk.{n}.attn_q.bias")}


def _metadata(fields: Fields) -> Fields:
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
        raise base.CheckpointError(
            "layers without experts: GGUF programs know none in this architecture"
        )
    count = "num_experts" if fields.get("num_experts") else "num_local_experts"
    found = base.sizes_of_experts(fields, count, "moe_intermediate_size")
    found["expert_weights_norm"] = bool(fields.get("norm_topk_prob"))
    if fields.get("shared_expert_intermediate_size"):
        found["expert_shared_feed_forward_length"] = int(fields["shared_expert_intermediate_size"])
    return found


QWEN2_MOE = WholeModel(
    "qwen2moe",
    ("qwen2_moe",),
    KEYS,
    (
        *base.WHOLE,
        *base.NORMS,
        *base.ATTENTION,
        *base.DENSE,
        *base.ROUTER,
        *base.shared_experts("shared_expert"),
        *SHARED_GATE,
    ),
    _qwen2,
    _metadata,
)
QWEN3_MOE = WholeModel(
    "qwen3moe",
    ("qwen3_moe",),
    KEYS,
    (*base.WHOLE, *base.NORMS, *base.ATTENTION, *base.QK_NORMS, *base.DENSE, *base.ROUTER),
    _qwen3,
    _metadata,
)
