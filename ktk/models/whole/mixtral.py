"""Mixtral, whose files say llama."""

from __future__ import annotations

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Source, WholeModel


def _config(source: Source) -> Fields:
    heads, hidden = source.required("attention.head_count"), source.required("embedding_length")
    base.check_rotary(source, source.get("attention.key_length") or hidden // heads)
    if dense := base.dense_layers(source):
        raise source.error(f"layers {dense} have no experts: Mixtral has them in every layer")
    return {
        "num_local_experts": source.experts.spec(0).num_experts,
        "intermediate_size": base.expert_width(source),
        "sliding_window": None,
    }


def _metadata(fields: Fields) -> Fields:
    if fields.get("sliding_window"):
        raise base.CheckpointError(
            f"sliding_window={fields['sliding_window']}: GGUF programs know none in this architecture"
        )
    found = base.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {**found, "feed_forward_length": found["expert_feed_forward_length"]}


MIXTRAL = WholeModel(
    "llama",
    ("mixtral",),
    base.GROUPED_KEYS,
    (
        *base.WHOLE,
        *base.NORMS,
        *base.permuted_attention(),
        *base.per_layer(
            "ffn_gate_inp", "mlp.gate", checkpoint="model.layers.{n}.block_sparse_moe.gate.weight"
        ),
    ),
    _config,
    _metadata,
)
