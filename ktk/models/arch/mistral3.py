"""Mistral Large 3 and its like: ``experts.E.{w1,w3,w2}`` right under the layer."""

from ktk.models.architecture import Architecture
from ktk.models.families import PerExpert
from ktk.models.gguf.architecture import GgufArchitecture

MISTRAL3 = Architecture(
    families=(PerExpert("mistral", "experts", "w1", "w3", "w2"),),
    gguf=GgufArchitecture("mistral3", gating=None, is_normalised=None),
)
