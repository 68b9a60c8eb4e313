"""Model families: how their experts' tensors are called and how they lie. One file and one line here each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ktk.checkpoint.safetensors import Checkpoint, read_json_object
from ktk.errors import CheckpointError
from ktk.models.base import NUM_LAYERS_KEYS, Config, Experts, Family, Layer
from ktk.models.coding import SOURCE_DTYPES
from ktk.models.deepseek import DEEPSEEK
from ktk.models.ffn import FFN
from ktk.models.fused import FUSED
from ktk.models.gpt_oss import GPT_OSS
from ktk.models.granite import GRANITE
from ktk.models.jamba import JAMBA
from ktk.models.lfm2 import LFM2
from ktk.models.metadata import read_generation
from ktk.models.mistral import MISTRAL
from ktk.models.mixtral import MIXTRAL
from ktk.models.nemotron_h import NEMOTRON_H

# Tried in this order, commonest first; a checkpoint must match exactly one.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        DEEPSEEK,
        MIXTRAL,
        FUSED,
        GPT_OSS,
        MISTRAL,
        FFN,
        JAMBA,
        LFM2,
        NEMOTRON_H,
        GRANITE,
    )
}


def check_directory(directory: Path) -> dict[str, Any]:
    """config.json of a directory, checked, as is generation_config.json beside it. Raises CheckpointError."""
    config = read_json_object(directory / "config.json")
    Config(config, str(directory / "config.json"))  # checks
    read_generation(directory)
    return config


def find_num_layers(checkpoint: Checkpoint) -> int | None:
    """Layers of the model by its config, those of multi-token prediction left out; None if it does not say."""
    return Config(checkpoint.config, str(checkpoint.directory / "config.json")).size(
        NUM_LAYERS_KEYS
    )


def find_experts(checkpoint: Checkpoint) -> Experts:
    """The experts of a checkpoint: its family from the tensor names, shapes and activation checked.

    Layers at or above the config's num_hidden_layers (multi-token prediction) are left alone.
    Raises CheckpointError if no family or several fit, experts are missing, or shapes contradict config.json.
    """
    config = Config(checkpoint.config, str(checkpoint.directory / "config.json"))
    num_layers = config.size(NUM_LAYERS_KEYS)
    found: dict[str, dict[int, dict[str, re.Match[str]]]] = {}
    for family in FAMILIES.values():
        pattern = family.pattern()
        if not family.accepts(config.model_type):
            continue
        for name in checkpoint.tensors:
            match = pattern.fullmatch(name)
            if match and (num_layers is None or int(match["layer"]) < num_layers):
                found.setdefault(family.name, {}).setdefault(int(match["layer"]), {})[name] = match
    if not found:
        styles = "; ".join(family.example for family in FAMILIES.values())
        raise CheckpointError(
            f"{checkpoint.path}: no tensor is named like an expert's. ktk knows: {styles}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: holds experts of several naming styles ({', '.join(found)}); one is allowed"
        )
    ((chosen, by_layer),) = found.items()
    family = FAMILIES[chosen]
    activation = config.activation(family.default_activation)
    layers: dict[int, Layer] = {}
    for index in sorted(by_layer):
        prefixes = {match["prefix"] for match in by_layer[index].values()}
        if len(prefixes) > 1:
            raise CheckpointError(
                f"{checkpoint.path}: layer {index} occurs under {' and '.join(sorted(prefixes))}; one is allowed"
            )
        layers[index] = family.layer(checkpoint, config, index, by_layer[index])
    return Experts(family, config, layers, activation, str(checkpoint.path))


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
