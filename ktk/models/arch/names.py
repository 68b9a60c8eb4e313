"""Styles of tensor names that several architectures share;
an architecture's own stands in its file.
"""

from ktk.models.families import Fused, PerExpert

MLP_EXPERTS = PerExpert("deepseek", r"mlp\.experts", "gate_proj", "up_proj", "down_proj")
BLOCK_SPARSE_MOE = PerExpert("mixtral", r"block_sparse_moe\.experts", "w1", "w3", "w2")
# Either way round.
STACKED = Fused(
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
)
