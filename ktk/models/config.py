"""config.json of a checkpoint, read by what a value means:
models spell the same thing in several ways.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktk.checkpoint.safetensors import Checkpoint, read_json_object
from ktk.errors import CheckpointError
from ktk.models.metadata import EXPERT_COUNTS, MAX_SIZE, TOP_KS, check_config, read_generation

NUM_EXPERTS_KEYS = EXPERT_COUNTS
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
TOP_K_KEYS = TOP_KS
# Nemotron-H may route a projection of the hidden state.
HIDDEN_KEYS = ("moe_latent_size", "hidden_size")
INTERMEDIATE_KEYS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "intermediate_size",
)
ACTIVATION_KEYS = ("mlp_hidden_act", "hidden_activation", "hidden_act")
# Where a model that also sees or hears keeps the config of its language model.
NESTED_KEYS = ("text_config", "language_config", "llm_config", "thinker_config")


@dataclass
class Config:
    """config.json of a checkpoint, its text part looked at first;
    every value is checked when asked for.
    """

    fields: dict[str, Any]
    where: str

    def __post_init__(self) -> None:
        self.parts = [self.fields]
        for _ in range(2):  # thinker_config.text_config
            for key in NESTED_KEYS:
                nested = self.parts[0].get(key)
                if isinstance(nested, dict):
                    self.parts.insert(0, nested)
                    break
                if nested is not None:
                    raise CheckpointError(
                        f"{self.where}: {key} is a {type(nested).__name__}: must be an object"
                    )
        check_config(self.parts, self.where)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Config:
        """A checkpoint's. Raises CheckpointError."""
        return cls(checkpoint.config, str(checkpoint.directory / "config.json"))

    def get(self, keys: Iterable[str]) -> tuple[str, Any]:
        """The first of ``keys`` that is there and not null, and its value; ("", None)
        if none is.
        """
        for part in self.parts:
            for key in keys:
                if part.get(key) is not None:
                    return key, part[key]
        return "", None

    def size(self, keys: Iterable[str], layer: int = 0) -> int | None:
        """A positive int, or the layer's entry of a list of them; None if there is no such key."""
        key, value = self.get(keys)
        if not key:
            return None
        if isinstance(value, list):
            if layer >= len(value):
                raise CheckpointError(
                    f"{self.where}: {key} lists {len(value)} layers: layer {layer} is missing"
                )
            value = value[layer]
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise CheckpointError(
                f"{self.where}: {key}={value!r}: must be an int of 1 to {MAX_SIZE}"
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number; ``default`` if there is no such key."""
        found, value = self.get((key,))
        if not found:
            return default
        if type(value) not in (int, float) or not abs(value) < 1e30:  # NaN is not either
            raise CheckpointError(f"{self.where}: {key}={value!r}: must be a number below 1e30")
        return float(value)

    @property
    def model_type(self) -> str:
        """Of the text part; "" if no part says one."""
        value = self.get(("model_type",))[1]
        return value if isinstance(value, str) else ""

    @property
    def model_types(self) -> list[str]:
        """Of every part that says one, the text part's first."""
        said = [part.get("model_type") for part in self.parts]
        return [kind for kind in said if isinstance(kind, str) and kind]

    @property
    def quantization(self) -> dict[str, Any]:
        """quantization_config; empty without one."""
        said = self.get(("quantization_config",))[1]
        return said if isinstance(said, dict) else {}


def check_directory(directory: Path) -> dict[str, Any]:
    """config.json of a directory, checked, as is generation_config.json beside it.

    Raises CheckpointError.
    """
    config = read_json_object(directory / "config.json")
    Config(config, str(directory / "config.json"))  # checks
    read_generation(directory)
    return config


def find_num_layers(checkpoint: Checkpoint) -> int | None:
    """Layers of the model by its config, those of multi-token prediction left out;
    None if it does not say.
    """
    return Config.of(checkpoint).size(NUM_LAYERS_KEYS)
