"""An adapter's directory, in peft's files, as matrices by the modules that they belong to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktk.checkpoint.safetensors import Checkpoint, read_json_object, shown
from ktk.errors import CheckpointError
from ktk.experts.lora import MAX_RANK
from ktk.paths import user_path
from ktk.train.files import CONFIG, PREFIX, WEIGHTS

_NAME = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+)\.lora_(?:(?P<projection>gate|up|down)_)?(?P<letter>[AB])"
    + r"(?P<weight>\.weight)?"
)


@dataclass(frozen=True)
class Adapter:
    """What one directory holds.

    config : adapter_config.json. rank, scaling : of every matrix; alpha / rank or, of rsLoRA,
        alpha / sqrt(rank).
    experts : of each experts module, by its name in transformers' model, gate_a, gate_b and so on,
        float32, of the shapes of ``ktk.experts.lora.ExpertLora``.
    linears : of each linear layer, by its name, A (rank, in_features) and B (out_features, rank),
        float32.
    """

    path: Path
    config: dict[str, Any]
    rank: int
    scaling: float
    experts: dict[str, dict[str, torch.Tensor]]
    linears: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def base(self) -> str | None:
        """The path of the model it was trained for, as the config says it."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) and said else None

    def delta(self, module: str, projection: str, expert: int) -> torch.Tensor:
        """scaling * B A of one expert's projection, float32 (out_features, in_features)."""
        found = self.experts[module]
        product = found[f"{projection}_b"][expert] @ found[f"{projection}_a"][expert]
        return self.scaling * product

    def linear_delta(self, module: str) -> torch.Tensor:
        """scaling * B A of a linear layer, float32 (out_features, in_features)."""
        a, b = self.linears[module]
        return self.scaling * (b @ a)


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """The adapter that ``ktk train``, ``save_expert_lora`` or peft over packed experts wrote.

    Raises CheckpointError for files that are damaged, incomplete or mean something else.
    """
    path = user_path(directory)
    config = read_json_object(path / CONFIG)
    rank, scaling = _rank_and_scaling(config, path / CONFIG)
    found: dict[str, dict[str, torch.Tensor]] = {}
    with Checkpoint.open(path / WEIGHTS) as file:
        for name in file.tensors:
            match = _NAME.fullmatch(name)
            if match is None or bool(match["projection"]) == bool(match["weight"]):
                raise CheckpointError(f"{path / WEIGHTS}: {shown(name)} is no matrix of an adapter")
            matrix = f"{match['projection'] or 'linear'}_{match['letter'].lower()}"
            found.setdefault(match["module"], {})[matrix] = _matrix(file, name)
    if not found:
        raise CheckpointError(f"{path / WEIGHTS}: has no adapters")
    experts, linears = {}, {}
    for module, matrices in found.items():
        _check(path / WEIGHTS, module, matrices, rank)
        if "linear_a" in matrices:
            linears[module] = (matrices["linear_a"], matrices["linear_b"])
        else:
            experts[module] = matrices
    return Adapter(path, config, rank, scaling, experts, linears)


def _rank_and_scaling(config: dict[str, Any], where: Path) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{where}: r={shown(rank)}: must be in 1..{MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise CheckpointError(f"{where}: lora_alpha={shown(alpha)}: must be a number")
    refused = ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "modules_to_save")
    for name in refused:
        if config.get(name):
            raise CheckpointError(f"{where}: {name}={shown(config[name])} is not supported")
    return rank, float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _matrix(file: Checkpoint, name: str) -> torch.Tensor:
    info = file.info(name)
    if info.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{info.file}: {shown(name)} is {info.dtype}: must be a float")
    values = file.read(name)
    if info.dtype == "BF16":
        return torch.from_numpy(values).view(torch.bfloat16).float()
    return torch.from_numpy(values.astype(np.float32))


def _check(where: Path, module: str, matrices: dict[str, torch.Tensor], rank: int) -> None:
    """CheckpointError unless every A has its B, both of this rank."""
    dims = 2 if "linear_a" in matrices or "linear_b" in matrices else 3
    for name, matrix in matrices.items():
        kind, letter = name.split("_")
        other = matrices.get(f"{kind}_{'b' if letter == 'a' else 'a'}")
        if other is None:
            raise CheckpointError(f"{where}: {shown(module)} has a {name} alone")
        place = matrix.ndim - (2 if letter == "a" else 1)
        if matrix.ndim != dims or other.ndim != dims or matrix.shape[place] != rank:
            raise CheckpointError(
                f"{where}: {shown(module)}: {name} has shape {tuple(matrix.shape)}: must be "
                f"{dims}-dimensional, of rank {rank}"
            )
        if dims == 3 and matrix.shape[0] != other.shape[0]:
            raise CheckpointError(f"{where}: {shown(module)}: A and B are of different experts")
