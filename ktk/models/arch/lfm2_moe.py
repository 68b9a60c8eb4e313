"""LFM2-MoE: ``feed_forward.experts.E.{w1,w3,w2}``; its config names no activation: SiLU."""

from ktk.models.architecture import Architecture
from ktk.models.families import PerExpert
from ktk.models.gguf.architecture import GgufArchitecture

LFM2_MOE = Architecture(
    ("lfm2_moe",),
    (PerExpert("lfm2", r"feed_forward\.experts", "w1", "w3", "w2"),),
    gguf=GgufArchitecture("lfm2moe", gating=None, is_normalised=None),
)
