"""OLMoE: q and k normalised over all heads at once."""

from __future__ import annotations

from ktk.errors import CheckpointError
from ktk.models.arch.names import MLP_EXPERTS
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rows import Fields, WholeModel
from ktk.models.whole.source import Source


def _config(source: Source) -> Fields:
    heads, hidden = source.required("attention.head_count"), source.required("embedding_length")
    source.check_rotary(hidden // heads)
    source.check_all_have_experts("OLMoE")
    if clamp := source.get("attention.clamp_kqv", float):
        raise source.error(f"olmoe.attention.clamp_kqv is {clamp}: llama.cpp runs it without")
    return {
        "num_experts": source.num_experts,
        "intermediate_size": source.expert_width,
        "norm_topk_prob": bool(source.experts.routing.expert_weights_norm),
    }


def _metadata(fields: Fields) -> Fields:
    if fields.get("clip_qkv") or fields.get("norm_topk_prob"):
        raise CheckpointError(
            "clip_qkv or norm_topk_prob: GGUF programs run this architecture without"
        )
    found = rows.sizes_of_experts(fields, "num_experts", "intermediate_size")
    return {**found, "feed_forward_length": found["expert_feed_forward_length"]}


WHOLE = WholeModel(
    "olmoe",
    rows.GROUPED_KEYS,
    (
        *rows.WHOLE,
        *rows.NORMS,
        *(row for row in rows.ATTENTION if row.hf.endswith(".weight")),
        *rows.QK_NORMS,
        *rows.ROUTER,
    ),
    _config,
    _metadata,
)
OLMOE = Architecture(
    ("olmoe",), (MLP_EXPERTS,), gguf=GgufArchitecture("olmoe", is_normalised=False), whole=WHOLE
)
