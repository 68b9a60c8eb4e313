"""OLMoE: q and k normalised over all heads at once."""

from __future__ import annotations

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Source, WholeModel


def _config(source: Source) -> Fields:
    heads, hidden = source.required("attention.head_count"), source.required("embedding_length")
    base.check_rotary(source, hidden // heads)
    if dense := base.dense_layers(source):
        raise source.error(f"layers {dense} have no experts: OLMoE has them in every layer")
    if clamp := source.get("attention.clamp_kqv", float):
        raise source.error(f"olmoe.attention.clamp_kqv is {clamp}: llama.cpp runs it without")
    return {
        "num_experts": source.experts.spec(0).num_experts,
        "intermediate_size": base.expert_width(source),
        "norm_topk_prob": bool(source.experts.routing.expert_weights_norm),
    }


def _metadata(fields: Fields) -> Fields:
    if fields.get("clip_qkv") or fields.get("norm_topk_prob"):
        raise base.CheckpointError(
            "clip_qkv or norm_topk_prob: GGUF programs run this architecture without"
        )
    found = base.sizes_of_experts(fields, "num_experts", "intermediate_size")
    return {**found, "feed_forward_length": found["expert_feed_forward_length"]}


OLMOE = WholeModel(
    "olmoe",
    ("olmoe",),
    base.GROUPED_KEYS,
    (
        *base.WHOLE,
        *base.NORMS,
        *(row for row in base.ATTENTION if row.hf.endswith(".weight")),
        *base.QK_NORMS,
        *base.ROUTER,
    ),
    _config,
    _metadata,
)
