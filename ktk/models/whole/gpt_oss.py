"""gpt-oss: sinks in the attention, every second layer in a window, biases everywhere."""

from __future__ import annotations

from ktk.models.whole import base
from ktk.models.whole.base import Fields, Key, Source, Tensor, WholeModel


def _config(source: Source) -> Fields:
    if dense := base.dense_layers(source):
        raise source.error(f"layers {dense} have no experts: gpt-oss has them in every layer")
    base.check_rotary(source, source.required("attention.key_length"))
    rope = base.rope_parameters(source)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # how the models were trained; a file cannot say it
        rope.setdefault("beta_fast", 32.0)
        rope.setdefault("beta_slow", 1.0)
    kinds = ("sliding_attention", "full_attention")
    return {
        "num_local_experts": source.experts.spec(0).num_experts,
        "intermediate_size": base.expert_width(source),
        "layer_types": [kinds[n % 2] for n in range(source.num_layers)],
        "attention_bias": source.has("blk.{n}.attn_q.bias"),
        "rope_parameters": rope,
    }


def _metadata(fields: Fields) -> Fields:
    kinds = ("sliding_attention", "full_attention")
    types = fields.get("layer_types")
    if types and any(given != kinds[n % 2] for n, given in enumerate(types)):
        raise base.CheckpointError(
            "layer_types: GGUF programs know sliding_attention in every second layer only"
        )
    found = base.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {
        **found,
        "feed_forward_length": found["expert_feed_forward_length"],
    }


GPT_OSS = WholeModel(
    "gpt-oss",
    ("gpt_oss",),
    (*base.GROUPED_KEYS, Key("attention.sliding_window", "sliding_window", is_required=True)),
    (
        *base.WHOLE,
        *base.per_layer("attn_norm", "input_layernorm"),
        *base.per_layer("post_attention_norm", "post_attention_layernorm"),
        *base.ATTENTION,
        Tensor("blk.{n}.attn_sinks.weight", "model.layers.{n}.self_attn.sinks"),
        *base.per_layer("ffn_gate_inp", "mlp.router", "weight", "bias"),
    ),
    _config,
    _metadata,
)
