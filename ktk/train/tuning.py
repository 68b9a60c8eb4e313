"""What ``ktk train`` puts beside a model's weights, and the directory it leaves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from ktk.checkpoint.packed import sync_directory
from ktk.integration.transformers.experts import find_experts
from ktk.train.peft_lora import lora_config, quiet_peft

PARTS = ("experts", "attention")


def attention_linears(model: torch.nn.Module) -> list[str]:
    """Last names of the float linear layers within attention, as peft's target_modules. ValueError
    without any.
    """
    found = set()
    for name, module in model.named_modules():
        *path, last = name.split(".")
        is_within = any("attn" in part or "attention" in part for part in path)
        if is_within and isinstance(module, torch.nn.Linear):
            found.add(last)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no float linear layers in its attention: leave "
            "attention out of the targets"
        )
    return sorted(found)


def adapted(
    model: Any, parts: Sequence[str], rank: int, alpha: float, dropout: float, seed: int
) -> PeftModel:
    """The model with new adapters, which change nothing yet; they alone are trained.

    parts : of PARTS. rank, alpha, dropout : of every adapter. seed : of their first values.
    Raises ValueError for what the model does not have.
    """
    if not parts or any(part not in PARTS for part in parts):
        raise ValueError(f"targets {','.join(parts)!r}: must be some of {','.join(PARTS)}")
    names: list[str] = []
    if "experts" in parts:
        modules = [name for name, _ in find_experts(model)]
        if not modules:
            raise ValueError(f"{type(model).__name__} has no experts that ktk runs")
        names += sorted({name.rpartition(".")[2] for name in modules})
    if "attention" in parts:
        names += attention_linears(model)
    torch.manual_seed(seed)
    config = lora_config(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        return get_peft_model(model, config)


def recompute(model: Any) -> None:
    """Keep only what each decoder layer is given for its backward pass, and compute the rest again:
    less memory, more time, the same bits.
    """
    # called so from transformers 5.23 on, gradient_checkpointing_enable before
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def write_adapter(model: PeftModel, directory: Path) -> None:
    """peft's files of the adapter, each whole or not there."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ktk-adapter-", dir=directory) as folder:
        model.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, directory / file.name)
    sync_directory(directory)
