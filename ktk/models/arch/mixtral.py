"""Mixtral, whose files say llama."""

from __future__ import annotations

from ktk.errors import CheckpointError
from ktk.models.arch.names import BLOCK_SPARSE_MOE
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rows import Fields, WholeModel
from ktk.models.whole.source import Source


def _config(source: Source) -> Fields:
    source.check_rotary(source.head_dim)
    source.check_all_have_experts("Mixtral")
    return {
        "num_local_experts": source.num_experts,
        "intermediate_size": source.expert_width,
        "sliding_window": None,
    }


def _metadata(fields: Fields) -> Fields:
    if fields.get("sliding_window"):
        raise CheckpointError(
            f"sliding_window={fields['sliding_window']}: GGUF programs know none in this "
            "architecture"
        )
    found = rows.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {**found, "feed_forward_length": found["expert_feed_forward_length"]}


WHOLE = WholeModel(
    "mixtral",
    rows.GROUPED_KEYS,
    (
        *rows.WHOLE,
        *rows.NORMS,
        *rows.permuted_attention(),
        *rows.per_layer(
            "ffn_gate_inp", "mlp.gate", checkpoint="model.layers.{n}.block_sparse_moe.gate.weight"
        ),
    ),
    _config,
    _metadata,
)
MIXTRAL = Architecture(
    ("mixtral",), (BLOCK_SPARSE_MOE,), gguf=GgufArchitecture("llama"), whole=WHOLE
)
