"""A finished adapter in a model that is to generate or to be measured."""

from __future__ import annotations

import os
from typing import Any

import torch

from ktk.experts.spec import MoESpec
from ktk.integration.transformers.adapters import TARGETS, ExpertAdapter, hang_adapter
from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.gradients import why_not_adapted
from ktk.train.adapter import Adapter, read_adapter


def attach_adapter(model: Any, directory: str | os.PathLike[str]) -> Adapter:
    """Put the adapters of a directory into a model, in place; none are trained.

    Those of experts, which must be packed, run beside their weights. Those of attention, which must
    be torch's, are added to its weights, once, and rounded to their dtype.
    Raises CheckpointError for files that are damaged or another model's, ValueError for what this
    one, as it was loaded, cannot have.
    """
    adapter = read_adapter(directory)
    modules = dict(model.named_modules())
    for name in (*adapter.experts, *adapter.linears):
        if name not in modules:
            raise ValueError(f"{adapter.path}: the model has no {name}: it is another's adapter")
    hung = {}
    for name, matrices in adapter.experts.items():
        handle = handle_of(modules[name])
        if handle is None:
            raise ValueError(f"{name} is not packed: its adapter cannot run")
        if (reason := why_not_adapted(handle)) is not None:
            raise ValueError(f"{name} cannot have its adapter: {reason}")
        hung[name] = _expert_adapter(adapter, name, matrices, handle.moe.spec)
    for name, (a, b) in adapter.linears.items():
        module = modules[name]
        if not isinstance(module, torch.nn.Linear):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which takes no adapter: load the model "
                "with --linear none"
            )
        if module.weight.shape != (len(b), a.shape[1]):
            raise _unlike(adapter, name, "weight", (len(b), a.shape[1]), module.weight.shape)
    for name, one in hung.items():
        hang_adapter(modules[name], one)
    for name in adapter.linears:
        weight = modules[name].weight
        merged = weight.detach().float() + adapter.linear_delta(name).to(weight.device)
        modules[name].weight = torch.nn.Parameter(merged.to(weight.dtype))
    model.requires_grad_(False)
    model.eval()
    return adapter


def _expert_adapter(
    adapter: Adapter, name: str, matrices: dict[str, torch.Tensor], spec: MoESpec
) -> ExpertAdapter:
    targets = [t for t in TARGETS if f"{t}_a" in matrices]
    one = ExpertAdapter(
        spec, targets, adapter.rank, adapter.scaling * adapter.rank, 0.0, torch.float32
    )
    with torch.no_grad():
        for own, parameter in one.named_parameters():
            if matrices[own].shape != parameter.shape:
                raise _unlike(adapter, name, own, matrices[own].shape, parameter.shape)
            parameter.copy_(matrices[own])
    return one


def _unlike(
    adapter: Adapter, name: str, matrix: str, given: tuple[int, ...], wanted: tuple[int, ...]
) -> ValueError:
    return ValueError(
        f"{adapter.path}: {name}: {matrix} has shape {tuple(given)}, the model needs "
        f"{tuple(wanted)}: it is another's adapter"
    )
