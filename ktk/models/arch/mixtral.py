"""``block_sparse_moe.experts.E.{w1,w3,w2}``: Mixtral, MiniMax, PhiMoE, Kimi Linear."""

from ktk.models.families import PerExpert

MIXTRAL = PerExpert("mixtral", r"block_sparse_moe\.experts", "w1", "w3", "w2")
