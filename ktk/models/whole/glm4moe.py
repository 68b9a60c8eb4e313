"""GLM-4.5 and its kin: DeepSeek V3's router over grouped-query attention, half of a head rotated."""

from __future__ import annotations

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Key, Source, Tensor, WholeModel


def _config(source: Source) -> Fields:
    routing, rope = source.experts.routing, base.rope_parameters(source)
    if routing.expert_gating_func != "sigmoid":
        raise source.error(f"gating {routing.expert_gating_func}: GLM-4-MoE has sigmoid")
    heads, hidden = source.required("attention.head_count"), source.required("embedding_length")
    size = source.get("attention.key_length") or hidden // heads
    rope["partial_rotary_factor"] = source.required("rope.dimension_count") / size
    shared = source.rows("blk.{n}.ffn_up_shexp.weight") or 0
    groups, width = routing.expert_group_count or 1, base.expert_width(source)
    return {
        "rope_parameters": rope,
        "n_routed_experts": source.experts.spec(source.experts.layers[0]).num_experts,
        "n_shared_experts": shared // width,
        "moe_intermediate_size": width,
        "first_k_dense_replace": base.leading_dense_layers(source),
        "routed_scaling_factor": routing.expert_weights_scale or 1.0,
        "norm_topk_prob": routing.expert_weights_norm is not False,
        "n_group": groups,
        "topk_group": routing.expert_group_used_count or groups,
        "use_qk_norm": source.has("blk.{n}.attn_q_norm.weight"),
        "attention_bias": source.has("blk.{n}.attn_q.bias"),
        "num_mtp_layers": 0,
    }


def _metadata(fields: Fields) -> Fields:
    part = base.rope_of(fields).get("partial_rotary_factor") or fields.get(
        "partial_rotary_factor", 0.5
    )
    found = base.sizes_of_experts(fields, "n_routed_experts", "moe_intermediate_size")
    return {
        **found,
        "rope.dimension_count": int(base.head_dim(fields) * float(part)),
        "expert_gating_func": 2,
        "expert_weights_norm": bool(fields.get("norm_topk_prob", True)),
        "nextn_predict_layers": 0,
    }


GLM4_MOE = WholeModel(
    "glm4moe",
    ("glm4_moe",),
    (
        *base.GROUPED_KEYS,
        Key("feed_forward_length", "intermediate_size"),
        Key("leading_dense_block_count", "first_k_dense_replace"),
        Key("expert_shared_count", "n_shared_experts"),
        Key("expert_weights_scale", "routed_scaling_factor", float),
        Key("expert_group_count", "n_group"),
        Key("expert_group_used_count", "topk_group"),
    ),
    (
        *base.WHOLE,
        *base.per_layer("attn_norm", "input_layernorm"),
        *base.per_layer("post_attention_norm", "post_attention_layernorm"),
        *base.ATTENTION,
        *base.QK_NORMS,
        *base.DENSE,
        *base.ROUTER,
        Tensor(
            "blk.{n}.exp_probs_b.bias",
            "model.layers.{n}.mlp.gate.e_score_correction_bias",
            is_optional=True,
        ),
        *base.shared_experts("shared_experts"),
    ),
    _config,
    _metadata,
)
