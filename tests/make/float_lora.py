"""Experts of transformers in float with adapters, all by torch's autograd: what training through
packed experts is compared with.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from ktk.experts.stored import ExpertWeights
from ktk.integration.transformers.activations import join_gate_up
from ktk.integration.transformers.experts import find_experts, handle_of

Matrices = Mapping[str, torch.Tensor]


def give_float_lora(
    plain: torch.nn.Module, packed: torch.nn.Module, adapters: Sequence[Matrices], scaling: float
) -> list[torch.nn.Parameter]:
    """Have ``plain``, which is ``packed`` before it was packed, compute with the dequantised
    weights of ``packed`` and with copies of its adapters; these copies, in order.

    adapters : of each experts module, in order.
    """
    parameters = []
    theirs = [module for _, module in find_experts(packed)]
    for (_, module), twin, matrices in zip(find_experts(plain), theirs, adapters, strict=True):
        handle = handle_of(twin)
        assert handle is not None
        weights = [handle.dequantised(e) for e in range(handle.moe.spec.num_experts)]
        copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in matrices.items()}
        for name, parameter in copies.items():  # Trainer takes what is the model's
            module.register_parameter(name, parameter)
        forward = types.MethodType(_forward(weights, copies, scaling), module)
        object.__setattr__(module, "forward", forward)
        parameters += list(copies.values())
    return parameters


def _forward(weights: list[ExpertWeights], lora: Matrices, scaling: float) -> Any:
    def forward(
        self: Any, hidden: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for e, w in enumerate(weights):
            token, slot = torch.nonzero(ids == e, as_tuple=True)
            if len(token):
                y = expert(self, w, {n: m[e] for n, m in lora.items()}, scaling, hidden[token])
                out = out.index_add(0, token, y * scale[token, slot, None])
        return out

    return forward


def expert(
    module: Any, w: ExpertWeights, lora: Matrices, scaling: float, x: torch.Tensor
) -> torch.Tensor:
    """One expert with its adapter, (rows, H) to (rows, H)."""

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        matrix, bias = getattr(w, name), getattr(w, f"{name}_bias")
        y = linear(x, _tensor(matrix), None if bias is None else _tensor(bias))
        if f"{name}_a" in lora:
            y = y + scaling * linear(linear(x, lora[f"{name}_a"]), lora[f"{name}_b"])
        return y

    up = project("up", x)
    if module.has_gate:
        h = module._apply_gate(join_gate_up(project("gate", x), up, module.is_concatenated))
    else:
        h = module.act_fn(up)
    return project("down", h)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
