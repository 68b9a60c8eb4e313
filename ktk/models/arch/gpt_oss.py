"""gpt-oss: sinks in the attention, every second layer in a window, biases everywhere."""

from __future__ import annotations

from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.models.architecture import Architecture
from ktk.models.families import Fused
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rope import rope_parameters
from ktk.models.whole.rows import Fields, Key, Tensor, WholeModel
from ktk.models.whole.source import Source


def _config(source: Source) -> Fields:
    source.check_all_have_experts("gpt-oss")
    source.check_rotary(source.required("attention.key_length"))
    rope = rope_parameters(source)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # how the models were trained; a file cannot say it
        rope.setdefault("beta_fast", 32.0)
        rope.setdefault("beta_slow", 1.0)
    kinds = ("sliding_attention", "full_attention")
    return {
        "num_local_experts": source.num_experts,
        "intermediate_size": source.expert_width,
        "layer_types": [kinds[n % 2] for n in range(source.num_layers)],
        "attention_bias": source.has("blk.{n}.attn_q.bias"),
        "rope_parameters": rope,
    }


def _metadata(fields: Fields) -> Fields:
    kinds = ("sliding_attention", "full_attention")
    types = fields.get("layer_types")
    if types and any(given != kinds[n % 2] for n, given in enumerate(types)):
        raise CheckpointError(
            "layer_types: GGUF programs know sliding_attention in every second layer only"
        )
    found = rows.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {
        **found,
        "feed_forward_length": found["expert_feed_forward_length"],
    }


# gate and up alternate; bf16 transposed, or MXFP4 blocks as rows
NAMES = Fused(
    "gpt_oss",
    r"mlp\.experts",
    {
        "gate_up_proj": "gate_up",
        "gate_up_proj_blocks": "gate_up",
        "gate_up_proj_scales": "gate_up_scale",
        "gate_up_proj_bias": "gate_up_bias",
        "down_proj": "down",
        "down_proj_blocks": "down",
        "down_proj_scales": "down_scale",
        "down_proj_bias": "down_bias",
    },
    is_interleaved=True,
    instead_of="fused",
)
WHOLE = WholeModel(
    "gpt_oss",
    (*rows.GROUPED_KEYS, Key("attention.sliding_window", "sliding_window", is_required=True)),
    (
        *rows.WHOLE,
        *rows.per_layer("attn_norm", "input_layernorm"),
        *rows.per_layer("post_attention_norm", "post_attention_layernorm"),
        *rows.ATTENTION,
        Tensor("blk.{n}.attn_sinks.weight", "model.layers.{n}.self_attn.sinks"),
        *rows.per_layer("ffn_gate_inp", "mlp.router", "weight", "bias"),
    ),
    _config,
    _metadata,
)
GPT_OSS = Architecture(
    ("gpt_oss",),
    (NAMES,),
    Activation.swigluoai(),
    stacks_biases=True,
    gguf=GgufArchitecture("gpt-oss", "softmax_of_top_k", is_normalised=False),
    whole=WHOLE,
)
