"""Models: what is in their checkpoints, by architecture (``arch``), and reading it."""

from __future__ import annotations

from ktk.models.arch import FAMILIES
from ktk.models.codings import SOURCE_DTYPES
from ktk.models.config import Config, check_directory, find_num_layers
from ktk.models.experts import Experts
from ktk.models.families import Family
from ktk.models.find import find_experts

__all__ = [
    "FAMILIES",
    "SOURCE_DTYPES",
    "Config",
    "Experts",
    "Family",
    "check_directory",
    "find_experts",
    "find_num_layers",
]
