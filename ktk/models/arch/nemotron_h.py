"""Nemotron-H: ``mixer.experts.E.{up,down}_proj`` without a gate projection;
hidden_size may be a latent one.
"""

from ktk.experts.activation import Activation
from ktk.models.architecture import Architecture
from ktk.models.families import PerExpert
from ktk.models.gguf.architecture import GgufArchitecture

NEMOTRON_H = Architecture(
    ("nemotron_h",),
    (PerExpert("nemotron_h", r"mixer\.experts", None, "up_proj", "down_proj"),),
    Activation.relu2(),
    gguf=GgufArchitecture("nemotron_h_moe", None, None, is_gateless=True),
)
