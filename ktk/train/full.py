"""Chosen experts trained in full beside packed ones, and written back among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ktk.experts.stored import StoredExperts
from ktk.integration.transformers.experts import ExpertsHandle, find_experts, hang, weight_names
from ktk.integration.transformers.gradients import why_not_adapted
from ktk.integration.transformers.trained_experts import TrainedExperts, hang_trained, trained_of
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.quantise.pack import pack_expert
from ktk.train.adapters import packed_experts


def train_experts(
    model: torch.nn.Module,
    experts: Mapping[str, Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
) -> list[torch.nn.Parameter]:
    """Make chosen experts parameters, which begin as their packed weights say; torch runs them,
    ktk the others.

    experts : numbers of experts by the name of their experts module, as in
        ``{"model.layers.0.mlp.experts": [3, 5]}``. Adapters leave them alone.
    dtype : of the parameters, torch.float32 or torch.bfloat16.
    Returns the parameters, layer by layer. ``write_back`` packs them again.
    Raises ValueError / TypeError for what does not fit, before anything is changed.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype={dtype}: must be torch.float32 or torch.bfloat16")
    found = packed_experts(model)
    chosen = {}
    for name, numbers in experts.items():
        if name not in found:
            raise ValueError(f"no experts module is called {name!r}: there are {', '.join(found)}")
        module, handle = found[name]
        if trained_of(module) is not None:
            raise ValueError(f"{name} has trained experts already: write_back(model) packs them")
        if (reason := _why_not(handle)) is not None:
            raise ValueError(f"experts of {name} cannot be trained: {reason}")
        for number in numbers:
            if not 0 <= number < handle.moe.spec.num_experts:
                raise ValueError(f"{name} has no expert {number}")
        chosen[name] = sorted(set(numbers))
    parameters = []
    for name, numbers in chosen.items():
        if not numbers:
            continue
        module, handle = found[name]
        trained = TrainedExperts(numbers, [handle.dequantised(e) for e in numbers], dtype)
        hang_trained(module, trained)
        for weight in weight_names(module):
            getattr(module, weight).requires_grad_(False)
        parameters += list(trained.parameters())
    return parameters


def _why_not(handle: ExpertsHandle) -> str | None:
    if not handle.moe.spec.is_packed:
        return "they are the blocks of a GGUF file, which are not written back"
    if handle.sources is not None:
        return "their float weights are still there: use_ktk(model) packs them"
    return why_not_adapted(handle)


def write_back(model: torch.nn.Module) -> list[str]:
    """Round trained experts into panels among the others, in the format these have, and run them
    there; the names of the experts modules that had some.

    A layer's panels are in memory twice while it is written. Raises ValueError if an expert's
    weights are not finite; the layers before it are then written.
    """
    names = []
    for name, module in find_experts(model):
        trained = trained_of(module)
        if trained is None:
            continue
        handle = packed_experts(model)[name][1]
        spec, before = handle.moe.spec, handle.moe.packed
        assert before.is_packed  # as train_experts found
        data = aligned_buffer(before.data.size).reshape(before.data.shape)
        data[:] = before.data
        for at, number in enumerate(trained.experts):
            try:
                pack_expert(spec, trained.weights(at), data[before.place(number)])
            except ValueError as error:
                raise ValueError(f"{name}: expert {number}: {error}") from None
        packed = StoredExperts.of_panels(spec, data, before.order)
        moe = MoE(packed, method=handle.moe.backend, num_threads=handle.moe.num_threads)
        hang(module, ExpertsHandle(moe, handle.activation, None))
        hang_trained(module, None)
        names.append(name)
    return names
