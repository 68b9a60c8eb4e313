"""Adapters of experts in peft's files: adapter_config.json and adapter_model.safetensors.

A tensor is named base_model.model.MODULE.lora_gate_A, as ``ktk.train.lora_config``'s modules are
when peft saves them, so either reads what the other wrote.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from ktk.checkpoint.packed import replacing, write_all
from ktk.checkpoint.safetensors import Checkpoint, read_json_object
from ktk.errors import CheckpointError
from ktk.experts.lora import MAX_RANK, ExpertLora
from ktk.integration.transformers.adapters import TARGETS, ExpertAdapter, adapter_of, hang_adapter
from ktk.paths import user_path
from ktk.train.adapters import expert_adapters, packed_experts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def parameter_name(matrix: str) -> str:
    """``lora_gate_A`` of ``gate_a``."""
    projection, letter = matrix.split("_")
    return f"lora_{projection}_{letter.upper()}"


def save_expert_lora(model: torch.nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model's experts into a directory, each file at once or not at all.

    ValueError without adapters.
    """
    adapters = expert_adapters(model)
    path = user_path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{name}.{parameter_name(matrix)}": values.detach().cpu().contiguous()
        for name, adapter in adapters.items()
        for matrix, values in adapter.named_parameters()
    }
    first = next(iter(adapters.values()))
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
    }
    _write(path / WEIGHTS, save(tensors, {"format": "pt"}))
    _write(path / CONFIG, json.dumps(said, indent=2).encode())


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        write_all(file, data)


def load_expert_lora(model: torch.nn.Module, directory: str | os.PathLike[str]) -> None:
    """Put the adapters of a directory beside a model's packed experts, to run or to train on.

    CheckpointError for files that are not adapters of these experts, ValueError where some have
    adapters already; nothing is changed then.
    """
    path = user_path(directory)
    config = read_json_object(path / CONFIG)
    rank, alpha, dropout = (
        _number(config, name, path) for name in ("r", "lora_alpha", "lora_dropout")
    )
    if rank not in range(1, MAX_RANK + 1) or not 0 <= dropout < 1:
        raise CheckpointError(f"{path / CONFIG}: r={rank}, lora_dropout={dropout}")
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise CheckpointError(f"{path / CONFIG}: {name} is for peft to load")
    if config.get("use_rslora"):
        alpha *= rank**0.5
    modules = packed_experts(model)
    adapters = {}
    with Checkpoint.open(path / WEIGHTS) as file:
        left = set(file.tensors)
        for name, (module, handle) in modules.items():
            if adapter_of(module) is not None:
                raise ValueError(f"{name} has an adapter already: remove_expert_lora takes it")
            spec = handle.moe.spec
            names = {m: f"{PREFIX}{name}.{parameter_name(m)}" for m in _matrices()}
            there = {m: n for m, n in names.items() if n in left}
            targets = [t for t in TARGETS if f"{t}_a" in there or f"{t}_b" in there]
            if not targets:
                continue
            dtype = _dtype(file, next(iter(there.values())))
            if "gate" in targets and not spec.has_gate:
                raise CheckpointError(f"{path / WEIGHTS}: {name} has no gate")
            adapter = ExpertAdapter(spec, targets, int(rank), alpha, dropout, dtype)
            for matrix, parameter in adapter.named_parameters():
                shape = ExpertLora.shape(matrix, spec, int(rank))
                parameter.data = _read(file, names[matrix], shape, dtype)
            adapter.train(module.training)
            adapters[name] = adapter
            left -= set(there.values())
        if left or not adapters:
            raise CheckpointError(
                f"{path / WEIGHTS}: {', '.join(sorted(left)[:3]) or 'nothing'} is not for these "
                "experts; where attention has adapters, too, load the directory with peft and "
                "ktk.train.lora_config"
            )
    for name, adapter in adapters.items():
        hang_adapter(modules[name][0], adapter)


def _matrices() -> list[str]:
    return [f"{target}_{letter}" for target in TARGETS for letter in "ab"]


def _number(config: dict[str, Any], name: str, path: Path) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{path / CONFIG}: {name}={value!r} is no number")
    return value


def _dtype(file: Checkpoint, name: str) -> torch.dtype:
    return torch.bfloat16 if file.info(name).dtype == "BF16" else torch.float32


def _read(file: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    info = file.info(name)  # CheckpointError if it is missing
    if info.shape != shape or info.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{info.file}: {name} is {info.dtype} {info.shape}: must be {shape}")
    values = file.read(name)
    if info.dtype == "BF16":
        return torch.from_numpy(values).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(values.astype(np.float32)).to(dtype)
