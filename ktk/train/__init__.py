"""Fine-tuning of models whose experts lie packed in memory, on the CPU.

- ``add_expert_lora(model)`` puts adapters beside the packed experts and returns their parameters;
  ``save_expert_lora`` and ``load_expert_lora`` use peft's files;
- ``lora_config(...)`` is a LoraConfig with which ``peft.get_peft_model`` does the same, beside
  adapters of attention; ``load_peft`` loads what it saved.
- ``train_experts(model, {module: numbers})`` makes chosen experts parameters, ``write_back(model)``
  rounds them into the packed ones.

The model comes from ``from_pretrained(..., quantization_config=ktk.KtkConfig(...))``,
``load_model`` or ``use_ktk``. Gradients also reach routers and all else that torch runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ktk.train.adapters import (
    add_expert_lora,
    enable_expert_lora,
    expert_lora_parameters,
    recompute_experts,
    remove_expert_lora,
    without_expert_lora,
)
from ktk.train.files import load_expert_lora, save_expert_lora
from ktk.train.full import train_experts, write_back

if TYPE_CHECKING:
    from ktk.train.peft_lora import load_peft, lora_config

_OF_PEFT = ("load_peft", "lora_config")

__all__ = [
    "add_expert_lora",
    "enable_expert_lora",
    "expert_lora_parameters",
    "load_expert_lora",
    "load_peft",
    "lora_config",
    "recompute_experts",
    "remove_expert_lora",
    "save_expert_lora",
    "train_experts",
    "without_expert_lora",
    "write_back",
]


def __getattr__(name: str) -> Any:
    if name in _OF_PEFT:
        return getattr(importlib.import_module("ktk.train.peft_lora"), name)
    raise AttributeError(f"module 'ktk.train' has no attribute {name!r}")
