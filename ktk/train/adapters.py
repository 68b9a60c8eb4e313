"""Adapters beside a model's packed experts, in the model's own modules: no peft is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ktk.experts.lora import MAX_RANK
from ktk.integration.transformers.adapters import (
    TARGETS,
    ExpertAdapter,
    adapter_of,
    hang_adapter,
    matrix_names,
)
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    find_experts,
    handle_of,
    weight_names,
)
from ktk.integration.transformers.gradients import recompute, why_not_adapted


def add_expert_lora(
    model: torch.nn.Module,
    r: int = 16,
    alpha: float = 32,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[torch.nn.Parameter]:
    """Put an adapter beside every layer's packed experts, which changes nothing yet: A is random,
    of torch's generator, B zero.

    r : rank, 1 to 128. alpha : what the adapter adds is times alpha / r.
    targets : projections that get one, of "gate", "up" and "down"; experts without a gate take the
        others.
    dropout : part of A's inputs that is dropped in training, 0 to below 1.
    dtype : of the parameters, torch.float32 or torch.bfloat16.
    Returns the parameters, layer by layer: A is (num_experts, r, in_features), B (num_experts,
    out_features, r). What else of the model requires gradients stays so: call
    ``model.requires_grad_(False)`` before to train the adapters alone.
    Raises ValueError / TypeError for what does not fit, before anything is added.
    """
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK:
        raise ValueError(f"r={r!r}: must be in 1..{MAX_RANK}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype={dtype}: must be torch.float32 or torch.bfloat16")
    found = packed_experts(model)
    for name, (module, handle) in found.items():
        if adapter_of(module) is not None:
            raise ValueError(f"{name} has an adapter already: remove_expert_lora(model) takes it")
        if (reason := why_not_adapted(handle)) is not None:
            raise ValueError(f"{name} cannot have adapters: {reason}")
        matrix_names(handle.moe.spec, targets)
    parameters = []
    for module, handle in found.values():
        adapter = ExpertAdapter(handle.moe.spec, targets, r, alpha, dropout, dtype)
        adapter.train(module.training)
        hang_adapter(module, adapter)
        for name in weight_names(module):
            getattr(module, name).requires_grad_(False)
        parameters += list(adapter.parameters())
    return parameters


def packed_experts(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, ExpertsHandle]]:
    """Experts modules by their names, with what is packed. ValueError if there are none."""
    found = {}
    for name, module in find_experts(model):
        handle = handle_of(module)
        if handle is None:
            raise ValueError(f"{name} is not packed: use_ktk(model) packs it")
        found[name] = module, handle
    if not found:
        raise ValueError(f"a {type(model).__name__} has no experts that ktk runs")
    return found


def expert_adapters(model: torch.nn.Module) -> dict[str, ExpertAdapter]:
    """Adapters by the names of their experts modules. ValueError if there are none."""
    found = {n: adapter_of(module) for n, module in find_experts(model)}
    adapters = {name: adapter for name, adapter in found.items() if adapter is not None}
    if not adapters:
        raise ValueError("no experts have adapters: add_expert_lora(model) adds them")
    return adapters


def expert_lora_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What ``add_expert_lora`` returned. ValueError without adapters."""
    return [p for adapter in expert_adapters(model).values() for p in adapter.parameters()]


def recompute_experts(model: torch.nn.Module, is_recomputed: bool = True) -> None:
    """Have backward passes compute gate and up projections again instead of keeping them.

    What is kept otherwise: 8 bytes (4 without a gate) x intermediate_size for each layer, token and
    slot. ValueError if no experts are packed.
    """
    for module, _ in packed_experts(model).values():
        recompute(module, is_recomputed)


def enable_expert_lora(model: torch.nn.Module, is_enabled: bool = True) -> None:
    """Have calls use the adapters, or not. ValueError without adapters."""
    for adapter in expert_adapters(model).values():
        adapter.is_enabled = is_enabled


@contextlib.contextmanager
def without_expert_lora(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts, calls do not use the adapters. ValueError without adapters."""
    adapters = list(expert_adapters(model).values())
    before = [adapter.is_enabled for adapter in adapters]
    enable_expert_lora(model, False)
    try:
        yield
    finally:
        for adapter, is_enabled in zip(adapters, before, strict=True):
            adapter.is_enabled = is_enabled


def remove_expert_lora(model: torch.nn.Module) -> None:
    """Take the adapters away: new tokens pass its decoder layers in native calls again.

    ValueError without adapters.
    """
    expert_adapters(model)
    for _, module in find_experts(model):
        hang_adapter(module, None)
