"""gpt-oss: stacked, gate and up alternate, with biases; bf16 transposed, or MXFP4 blocks as rows."""

from ktk.models.families import Fused

GPT_OSS = Fused(
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
    only_for=("gpt_oss",),
    bias_models=("gpt_oss",),
)
