"""Jamba: ``feed_forward.experts.E.{gate,up,down}_proj``;
layers without an expert index are dense.
"""

from ktk.models.architecture import Architecture
from ktk.models.families import PerExpert
from ktk.models.gguf.architecture import GgufArchitecture

JAMBA = Architecture(
    ("jamba",),
    (PerExpert("jamba", r"feed_forward\.experts", "gate_proj", "up_proj", "down_proj"),),
    gguf=GgufArchitecture("jamba", is_normalised=False),
)
