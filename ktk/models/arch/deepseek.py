"""``mlp.experts.E.{gate,up,down}_proj``: DeepSeek V2 and V3, Qwen2/3-MoE, Qwen3-Next, GLM-4-MoE, Kimi K2, OLMoE."""

from ktk.models.families import PerExpert

DEEPSEEK = PerExpert("deepseek", r"mlp\.experts", "gate_proj", "up_proj", "down_proj")
