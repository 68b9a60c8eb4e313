"""GLM-4.5 and its kin: DeepSeek V3's router over grouped-query attention,
half of a head rotated.
"""

from __future__ import annotations

from ktk.models.arch.names import MLP_EXPERTS
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rope import rope_of, rope_parameters
from ktk.models.whole.rows import Fields, Key, Tensor, WholeModel
from ktk.models.whole.source import Source


def _config(source: Source) -> Fields:
    routing, rope = source.experts.routing, rope_parameters(source)
    if routing.expert_gating_func != "sigmoid":
        raise source.error(f"gating {routing.expert_gating_func}: GLM-4-MoE has sigmoid")
    rope["partial_rotary_factor"] = source.required("rope.dimension_count") / source.head_dim
    shared = source.rows("blk.{n}.ffn_up_shexp.weight") or 0
    groups, width = routing.expert_group_count or 1, source.expert_width
    return {
        "rope_parameters": rope,
        "n_routed_experts": source.num_experts,
        "n_shared_experts": shared // width,
        "moe_intermediate_size": width,
        "first_k_dense_replace": source.leading_dense_layers,
        "routed_scaling_factor": routing.expert_weights_scale or 1.0,
        "norm_topk_prob": routing.expert_weights_norm is not False,
        "n_group": groups,
        "topk_group": routing.expert_group_used_count or groups,
        "use_qk_norm": source.has("blk.{n}.attn_q_norm.weight"),
        "attention_bias": source.has("blk.{n}.attn_q.bias"),
        "num_mtp_layers": 0,
    }


def _metadata(fields: Fields) -> Fields:
    part = rope_of(fields).get("partial_rotary_factor") or fields.get("partial_rotary_factor", 0.5)
    found = rows.sizes_of_experts(fields, "n_routed_experts", "moe_intermediate_size")
    return {
        **found,
        "rope.dimension_count": int(rows.head_dim(fields) * float(part)),
        "expert_gating_func": 2,
        "expert_weights_norm": bool(fields.get("norm_topk_prob", True)),
        "nextn_predict_layers": 0,
    }


WHOLE = WholeModel(
    "glm4_moe",
    (
        *rows.GROUPED_KEYS,
        Key("feed_forward_length", "intermediate_size"),
        Key("leading_dense_block_count", "first_k_dense_replace"),
        Key("expert_shared_count", "n_shared_experts"),
        Key("expert_weights_scale", "routed_scaling_factor", float),
        Key("expert_group_count", "n_group"),
        Key("expert_group_used_count", "topk_group"),
    ),
    (
        *rows.WHOLE,
        *rows.per_layer("attn_norm", "input_layernorm"),
        *rows.per_layer("post_attention_norm", "post_attention_layernorm"),
        *rows.ATTENTION,
        *rows.QK_NORMS,
        *rows.DENSE,
        *rows.ROUTER,
        Tensor(
            "blk.{n}.exp_probs_b.bias",
            "model.layers.{n}.mlp.gate.e_score_correction_bias",
            is_optional=True,
        ),
        *rows.shared_experts("shared_experts"),
    ),
    _config,
    _metadata,
)
GLM4_MOE = Architecture(
    ("glm4_moe",),
    (MLP_EXPERTS,),
    gguf=GgufArchitecture("glm4moe", gating="sigmoid", is_normalised=None),
    whole=WHOLE,
)
