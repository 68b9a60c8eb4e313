"""DeepSeek V2, V3 and R1, Kimi-K2: latent attention, kv_b whole in older files, as k_b and v_b in newer ones."""

from __future__ import annotations

import numpy as np

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Key, Source, Tensor, WholeModel


def _join_kv_b(arrays: list[np.ndarray], fields: Fields) -> np.ndarray:
    k, v = arrays  # (heads, kv_lora_rank, nope), (heads, v_head_dim, kv_lora_rank)
    both = np.concatenate([k.swapaxes(1, 2), v], axis=1)
    return both.reshape(-1, both.shape[2])


def _split_kv_b(array: np.ndarray, fields: Fields) -> list[np.ndarray]:
    heads, nope = int(fields["num_attention_heads"]), int(fields["qk_nope_head_dim"])
    both = array.reshape(heads, -1, array.shape[1])
    return [
        np.ascontiguousarray(both[:, :nope].swapaxes(1, 2)),
        np.ascontiguousarray(both[:, nope:]),
    ]


def _config(source: Source) -> Fields:
    routing = source.experts.routing
    key = source.get("attention.key_length_mla") or source.required("attention.key_length")
    value = source.get("attention.value_length_mla") or source.required("attention.value_length")
    rotated = source.required("rope.dimension_count")
    if rotated >= key:
        raise source.error(f"{source.architecture}: keys of {key} rotate {rotated}: must be fewer")
    groups = routing.expert_group_count or 1
    fields: Fields = {
        "num_key_value_heads": source.required("attention.head_count"),
        "q_lora_rank": source.get("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "first_k_dense_replace": base.leading_dense_layers(source),
        "n_routed_experts": source.experts.spec(source.experts.layers[0]).num_experts,
        "n_shared_experts": _shared(source),
        "moe_intermediate_size": base.expert_width(source),
        "routed_scaling_factor": routing.expert_weights_scale or 1.0,
        "norm_topk_prob": bool(routing.expert_weights_norm),
        "n_group": groups,
        "topk_group": routing.expert_group_used_count or groups,
        "num_mtp_layers": 0,
    }
    rope = base.rope_parameters(source)
    scale = source.get("rope.scaling.yarn_log_multiplier", float)
    if rope["rope_type"] == "yarn" and scale:
        # The file's is a tenth of mscale_all_dim, and says nothing of an mscale that differs.
        fields["rope_parameters"] = {**rope, "mscale": 10 * scale, "mscale_all_dim": 10 * scale}
    if routing.expert_gating_func == "sigmoid":
        return {**fields, "model_type": "deepseek_v3"}
    if routing.expert_gating_func != "softmax" or fields["norm_topk_prob"]:
        raise source.error(
            f"gating {routing.expert_gating_func}, normalised: {fields['norm_topk_prob']}: ktk can run softmax without "
            "and sigmoid with or without"
        )
    method = "group_limited_greedy" if groups > 1 else "greedy"
    return {**fields, "model_type": "deepseek_v2", "topk_method": method}


def _shared(source: Source) -> int:
    """Shared experts, by their width; the metadata's count agrees with it or is missing."""
    rows, width = source.rows("blk.{n}.ffn_up_shexp.weight"), base.expert_width(source)
    if rows is None or rows % width:
        raise source.error(
            f"shared experts have {rows} rows: must be a multiple of the experts' {width}"
        )
    return rows // width


def _metadata(fields: Fields) -> Fields:
    rank, rotated = int(fields["kv_lora_rank"]), int(fields["qk_rope_head_dim"])
    is_sigmoid = fields["model_type"] != "deepseek_v2"
    found: Fields = {
        **base.sizes_of_experts(fields, "n_routed_experts", "moe_intermediate_size"),
        "rope.dimension_count": rotated,
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": int(fields["qk_nope_head_dim"]) + rotated,
        "attention.value_length_mla": int(fields["v_head_dim"]),
        "expert_gating_func": 2 if is_sigmoid else 1,
        "expert_weights_norm": is_sigmoid and bool(fields.get("norm_topk_prob", True)),
    }
    if (fields.get("n_group") or 1) > 1 and fields.get("topk_method") != "greedy":
        found["expert_group_count"] = int(fields["n_group"])
        found["expert_group_used_count"] = int(fields["topk_group"])
    rope = base.rope_of(fields)
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    return found


DEEPSEEK2 = WholeModel(
    "deepseek2",
    ("deepseek_v3", "deepseek_v2", "kimi_k2"),
    (
        Key("attention.kv_lora_rank", "kv_lora_rank", is_required=True),
        Key("attention.q_lora_rank", "q_lora_rank"),
        Key("feed_forward_length", "intermediate_size"),
        Key("leading_dense_block_count", "first_k_dense_replace"),
        Key("expert_shared_count", "n_shared_experts"),
        Key("expert_weights_scale", "routed_scaling_factor", float),
    ),
    (
        *base.WHOLE,
        *base.NORMS,
        *base.per_layer("attn_q", "self_attn.q_proj"),
        *base.per_layer("attn_q_a", "self_attn.q_a_proj"),
        *base.per_layer("attn_q_a_norm", "self_attn.q_a_layernorm"),
        *base.per_layer("attn_q_b", "self_attn.q_b_proj"),
        *base.per_layer("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
        *base.per_layer("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
        # The first that a file has counts: some hold kv_b both ways.
        Tensor(
            ("blk.{n}.attn_k_b.weight", "blk.{n}.attn_v_b.weight"),
            "model.layers.{n}.self_attn.kv_b_proj.weight",
            _join_kv_b,
            _split_kv_b,
        ),
        *base.per_layer("attn_kv_b", "self_attn.kv_b_proj"),
        *base.per_layer("attn_output", "self_attn.o_proj"),
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
