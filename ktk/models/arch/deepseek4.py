"""DeepSeek-V4: ``ffn.experts.E.{w1,w3,w2}``, whose SiLU config.json's swiglu_limit clamps,
or a GGUF file's key layer by layer.
"""

from ktk.models.architecture import Architecture
from ktk.models.families import PerExpert
from ktk.models.gguf.architecture import GgufArchitecture

DEEPSEEK4 = Architecture(
    families=(PerExpert("ffn", r"ffn\.experts", "w1", "w3", "w2"),),
    gguf=GgufArchitecture("deepseek4", gating=None, is_normalised=None, clamps_swiglu=True),
)
