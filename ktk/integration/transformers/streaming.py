"""Experts modules over one pool of slots, their experts read as tokens need them."""

from __future__ import annotations

from typing import Any

import torch

from ktk.errors import BackendError, CheckpointError
from ktk.experts.activation import Activation
from ktk.integration.transformers.activations import recognise
from ktk.integration.transformers.experts import ExpertsHandle, find_experts, handle_of, hang
from ktk.integration.transformers.gpu_experts import Placement
from ktk.integration.transformers.sources import ExpertsSource, layer_of
from ktk.log import logger
from ktk.machine import cpu
from ktk.models.config import TOP_K_KEYS
from ktk.ops.streamed import StreamedMoE
from ktk.ops.streamed_layers import StreamedLayers
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.slots import Slots


def stream(
    model: torch.nn.Module,
    modules: dict[str, torch.nn.Module],
    source: ExpertsSource,
    memory: ExpertMemory,
    method: str = "auto",
    num_threads: int | None = None,
    placement: Placement | None = None,
) -> None:
    """Hang experts that come and go on modules without weights.

    modules : by name. source : has a reader. placement : which experts a device has. Raises
    ValueError if not even one token's experts fit, BackendError if nothing runs them so,
    CheckpointError for files that cannot be read.
    """
    assert source.open_reader is not None
    by_layer = {layer_of(name): module for name, module in modules.items()}
    numbers = sorted(by_layer)
    known = {number: recognise(by_layer[number]) for number in numbers}
    for number, activation in known.items():
        if activation is None and source.specs[number].has_bias:
            raise BackendError(
                f"layer {number}: the model computes its activation itself, between biases: its "
                "experts must be in memory, all of them; leave expert_memory out"
            )
    reader = source.open_reader(numbers)
    layers = StreamedLayers(
        reader,
        numbers,
        memory,
        top_k_of(model),
        activations={number: found or Activation() for number, found in known.items()},
        method=method,
        num_threads=num_threads,
        where=source.where,
        elsewhere=None if placement is None else {n: placement.mask(n) for n in numbers},
    )
    _, free = cpu.memory()
    if free and layers.room.num_bytes > free:
        logger.warning(
            "experts may take %.1f GB of memory, and %.1f GB are free: they will not all fit",
            layers.room.num_bytes / 1e9,
            free / 1e9,
        )
    for number, module in by_layer.items():
        moe, hybrid = layers[number], None
        if placement is not None:
            hybrid = placement.operator(number, moe, None, method)
        hang(module, ExpertsHandle(moe, known[number], None, hybrid=hybrid))


def expert_slots(model: torch.nn.Module) -> Slots | None:
    """Where a model's experts come and go, None where all are in memory."""
    handles = (handle_of(module) for _, module in find_experts(model))
    return next((h.moe.slots for h in handles if h and isinstance(h.moe, StreamedMoE)), None)


def top_k_of(model: Any) -> int:
    """Experts that one token uses in a layer. CheckpointError if its config does not say."""
    config = model.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in TOP_K_KEYS)
    top_k = next((value for value in found if isinstance(value, int) and value > 0), None)
    if top_k is None:
        raise CheckpointError(
            f"{type(model).__name__}: its config has none of {', '.join(TOP_K_KEYS)}: it cannot be "
            "told how many experts one token uses"
        )
    return top_k
