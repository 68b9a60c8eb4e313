"""Layer shapes of real models, for benchmarks: hidden_size, intermediate_size, num_experts, top_k."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


QWEN3_30B = Shape(2048, 768, 128, 8)
DEEPSEEK_V3_32 = Shape(
    7168, 2048, 32, 8
)  # 32 of its 256 experts: fits this machine in every format
MIXTRAL_8X7B = Shape(4096, 14336, 8, 2)
SHAPES = {"qwen3-30b": QWEN3_30B, "deepseek-v3-32": DEEPSEEK_V3_32, "mixtral-8x7b": MIXTRAL_8X7B}
