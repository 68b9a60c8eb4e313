"""A model's layers and experts, as ``ktk.placement.masks`` counts them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ktk.models.config import NUM_LAYERS_KEYS
from ktk.placement.masks.grid import ExpertGrid


def said(config: Any, keys: tuple[str, ...]) -> int:
    """The first of the keys that a config's language model has; 0 if it has none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, key, None) for key in keys)
    return next((value for value in found if isinstance(value, int)), 0)


def model_grid(model: Any, layers: Iterable[int], num_experts: int) -> ExpertGrid:
    """layers : of the experts modules. num_experts : of the layer that has most."""
    of_moe = tuple(sorted(layers))
    num_layers = max(said(getattr(model, "config", None), NUM_LAYERS_KEYS), of_moe[-1] + 1)
    return ExpertGrid(num_layers, num_experts, of_moe)


def holder_of_layers(model: torch.nn.Module, experts: str) -> torch.nn.Module:
    """The module whose list the layers with experts are in: every pass goes through it, whichever
    head is asked. experts : the name of one experts module.
    """
    parts = experts.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), torch.nn.ModuleList):
            return model.get_submodule(".".join(parts[: end - 1]))
    return model
