"""MiniMax-M3, also where it sees: gpt-oss's activation, its numbers by config.json."""

from ktk.experts.activation import Activation
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture

MINIMAX_M3 = Architecture(
    ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"),
    activation=Activation.swigluoai(),
    gguf=GgufArchitecture("minimax-m3", gating=None, is_normalised=None),
)
