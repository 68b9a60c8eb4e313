"""A finished adapter beside the weights of a model that is to generate or to be measured."""

from __future__ import annotations

import os
from typing import Any

import torch

from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.gradients import why_not_adapted
from ktk.train.adapter import Adapter, read_adapter
from ktk.train.files import load_expert_lora

NOT_NATIVE = (
    "with an adapter beside its weights transformers runs the decoder layers, slower than ktk's "
    "own: `ktk train export --to packed` makes a model that has it in its weights"
)


def attach_adapter(model: Any, directory: str | os.PathLike[str]) -> Adapter:
    """Put the adapters of a directory beside a model's weights, in place; none are trained.

    Experts must be packed, and other layers torch's.
    Raises CheckpointError for files that are damaged or another model's, ValueError for what this
    one, as it was loaded, cannot have; ImportError if attention has adapters and peft is missing.
    """
    adapter = read_adapter(directory)
    modules = dict(model.named_modules())
    for name in (*adapter.experts, *adapter.linears):
        if name not in modules:
            raise ValueError(f"{adapter.path}: the model has no {name}: it is another's adapter")
    for name in adapter.experts:
        handle = handle_of(modules[name])
        if handle is None:
            raise ValueError(f"{name} is not packed: its adapter cannot run")
        if (reason := why_not_adapted(handle)) is not None:
            raise ValueError(f"{name} cannot have its adapter: {reason}")
    for name in adapter.linears:
        if not isinstance(modules[name], torch.nn.Linear):
            raise ValueError(
                f"{name} is a {type(modules[name]).__name__}, which takes no adapter: load the "
                "model with --linear none"
            )
    if not adapter.linears:
        load_expert_lora(model, directory)
    else:
        from ktk.train.peft_lora import load_peft, quiet_peft

        with quiet_peft():
            load_peft(model, directory)
    model.requires_grad_(False)
    model.eval()
    return adapter
