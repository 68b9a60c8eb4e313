"""MiniMax M2: q and k normalised over all heads at once, a part of each head rotated, sigmoid routing with a correction."""

from __future__ import annotations

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Source, Tensor, WholeModel


def _config(source: Source) -> Fields:
    if dense := base.dense_layers(source):
        raise source.error(f"layers {dense} have no experts: MiniMax M2 has them in every layer")
    rope = base.rope_parameters(source)
    size = source.required("attention.key_length")
    rope["partial_rotary_factor"] = source.required("rope.dimension_count") / size
    return {
        "rope_parameters": rope,
        "num_local_experts": source.experts.spec(0).num_experts,
        "intermediate_size": base.expert_width(source),
    }


def _metadata(fields: Fields) -> Fields:
    part = base.rope_of(fields).get("partial_rotary_factor")
    rotated = fields.get("rotary_dim") or int(base.head_dim(fields) * (part or 1.0))
    found = base.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {
        **found,
        "feed_forward_length": found["expert_feed_forward_length"],
        "rope.dimension_count": int(rotated),
        "expert_gating_func": 2,
    }


MINIMAX_M2 = WholeModel(
    "minimax-m2",
    ("minimax_m2",),
    base.GROUPED_KEYS,
    (
        *base.WHOLE,
        *base.NORMS,
        *(row for row in base.ATTENTION if row.hf.endswith(".weight")),
        *base.QK_NORMS,
        *base.per_layer(
            "ffn_gate_inp", "mlp.gate", checkpoint="model.layers.{n}.block_sparse_moe.gate.weight"
        ),
        Tensor(
            "blk.{n}.exp_probs_b.bias",
            "model.layers.{n}.mlp.e_score_correction_bias",
            checkpoint="model.layers.{n}.block_sparse_moe.e_score_correction_bias",
            is_optional=True,
        ),
    ),
    _config,
    _metadata,
)
