"""Qwen3-MoE: q and k normalised head by head."""

from __future__ import annotations

from ktk.errors import CheckpointError
from ktk.models.arch.names import MLP_EXPERTS
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rows import Fields, Key, WholeModel
from ktk.models.whole.source import Source

KEYS = (*rows.GROUPED_KEYS, Key("feed_forward_length", "intermediate_size"))


def config_of_experts(source: Source) -> Fields:
    """What Qwen2-MoE and Qwen3-MoE say alike."""
    source.check_rotary(source.head_dim)
    return {
        "num_experts": source.num_experts,
        "moe_intermediate_size": source.expert_width,
        "norm_topk_prob": bool(source.experts.routing.expert_weights_norm),
        "mlp_only_layers": source.dense_layers,
        "decoder_sparse_step": 1,
    }


def _config(source: Source) -> Fields:
    return {**config_of_experts(source), "attention_bias": source.has("blk.{n}.attn_q.bias")}


def metadata(fields: Fields) -> Fields:
    """The other way, of both."""
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError(
            "layers without experts: GGUF programs know none in this architecture"
        )
    count = "num_experts" if fields.get("num_experts") else "num_local_experts"
    found = rows.sizes_of_experts(fields, count, "moe_intermediate_size")
    found["expert_weights_norm"] = bool(fields.get("norm_topk_prob"))
    if fields.get("shared_expert_intermediate_size"):
        found["expert_shared_feed_forward_length"] = int(fields["shared_expert_intermediate_size"])
    return found


WHOLE = WholeModel(
    "qwen3_moe",
    KEYS,
    (*rows.WHOLE, *rows.NORMS, *rows.ATTENTION, *rows.QK_NORMS, *rows.DENSE, *rows.ROUTER),
    _config,
    metadata,
)
QWEN3_MOE = Architecture(
    ("qwen3_moe",), (MLP_EXPERTS,), gguf=GgufArchitecture("qwen3moe"), whole=WHOLE
)
