"""``block_sparse_moe.{input,output}_linear.weight``, stacked: Granite MoE."""

from ktk.models.families import Fused

GRANITE = Fused(
    "granite",
    r"block_sparse_moe",
    {"input_linear.weight": "gate_up", "output_linear.weight": "down"},
)
