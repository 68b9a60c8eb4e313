"""``ffn.experts.E.{w1,w3,w2}``: DeepSeek-V4, whose SiLU the config's swiglu_limit clamps."""

from ktk.models.families import PerExpert

FFN = PerExpert("ffn", r"ffn\.experts", "w1", "w3", "w2")
