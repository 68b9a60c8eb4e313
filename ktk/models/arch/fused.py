"""``mlp.experts.gate_up_proj`` and ``down_proj``, stacked: Qwen3-VL-MoE, Qwen3.5-MoE, Gemma 4, either way round."""

from ktk.models.families import Fused

FUSED = Fused(
    "fused",
    r"(?:mlp\.)?experts",
    {
        "gate_up_proj": "gate_up",
        "gate_up_proj_scale_inv": "gate_up_scale",
        "gate_up_proj_bias": "gate_up_bias",
        "down_proj": "down",
        "down_proj_scale_inv": "down_scale",
        "down_proj_bias": "down_bias",
    },
    not_for=("gpt_oss",),
    bias_models=("openai_privacy_filter",),
)
