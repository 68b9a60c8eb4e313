"""Adapters of an experts module: the matrices that train beside its packed weights.

Who has them: the module itself, as a child that ``hang_adapter`` gave it, or a module of peft's
around it, which hands them to ``ktk_experts_forward``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ktk.experts.lora import ExpertLora
from ktk.experts.spec import MoESpec

TARGETS = ("gate", "up", "down")
_CHILD = "ktk_lora"


@dataclass(frozen=True)
class LoraTensors:
    """What one adapter adds in a call.

    matrices : by the names of ``ExpertLora.arrays``, of their shapes; any float dtype, any device.
    scaling : alpha / rank. dropout : of this call, 0 in evaluation.
    """

    matrices: dict[str, torch.Tensor]
    scaling: float
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return next(m.shape[1] for name, m in self.matrices.items() if name.endswith("_a"))


def combined(found: Sequence[LoraTensors]) -> LoraTensors | None:
    """Several adapters as one, whose rank is the sum of theirs; gradients reach each.

    ValueError if they drop different parts of their inputs, for which one mask must do.
    """
    if len(found) < 2:
        return found[0] if found else None
    dropouts = {one.dropout for one in found}
    if len(dropouts) > 1:
        raise ValueError(
            f"adapters with dropout {sorted(dropouts)} are active at once: one mask is drawn for "
            "all, so give them the same, or call model.eval()"
        )
    projections = [t for t in TARGETS if any(f"{t}_a" in one.matrices for one in found)]
    matrices = {}
    for projection in projections:
        shapes = next(
            (one.matrices[f"{projection}_a"], one.matrices[f"{projection}_b"])
            for one in found
            if f"{projection}_a" in one.matrices
        )
        parts = [_scaled(one, projection, shapes) for one in found]
        matrices[f"{projection}_a"] = torch.cat([a for a, _ in parts], dim=1)
        matrices[f"{projection}_b"] = torch.cat([b for _, b in parts], dim=2)
    return LoraTensors(matrices, 1.0, dropouts.pop())


def _scaled(
    one: LoraTensors, projection: str, like: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A, and B times its scaling, float32; zeros where the adapter leaves the projection out."""
    if f"{projection}_a" in one.matrices:
        a, b = (one.matrices[f"{projection}_{letter}"].float() for letter in "ab")
        return a, b * one.scaling
    experts, _, columns = like[0].shape
    a = torch.zeros(experts, one.rank, columns, device=like[0].device)
    return a, torch.zeros(experts, like[1].shape[1], one.rank, device=a.device)


def initialise(name: str, matrix: torch.Tensor) -> None:
    """A as torch.nn.Linear's weights, B zero: an adapter that changes nothing yet."""
    with torch.no_grad():
        if name.endswith("_b"):
            matrix.zero_()
        else:
            bound = 1 / math.sqrt(matrix.shape[-1])  # kaiming_uniform_ with a = sqrt(5), per expert
            matrix.uniform_(-bound, bound)


def matrix_names(spec: MoESpec, targets: Sequence[str]) -> list[str]:
    """``gate_a``, ``gate_b`` and so on. ValueError for what these experts do not have."""
    if not targets or any(t not in TARGETS for t in targets):
        raise ValueError(f"targets={tuple(targets)!r}: must be some of {TARGETS}")
    if "gate" in targets and not spec.has_gate:
        raise ValueError(f"targets={tuple(targets)!r}: these experts have no gate; leave it out")
    return [f"{t}_{letter}" for t in TARGETS if t in targets for letter in "ab"]


class ExpertAdapter(torch.nn.Module):
    """An adapter of one layer's experts: parameters gate_a, gate_b and so on.

    is_enabled : whether calls use it.
    """

    def __init__(
        self,
        spec: MoESpec,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.targets, self.rank, self.alpha = tuple(targets), rank, float(alpha)
        self.dropout = dropout
        self.is_enabled = True
        for name in matrix_names(spec, targets):
            matrix = torch.nn.Parameter(
                torch.empty(ExpertLora.shape(name, spec, rank), dtype=dtype)
            )
            initialise(name, matrix)
            self.register_parameter(name, matrix)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def tensors(self) -> LoraTensors:
        dropout = self.dropout if self.training else 0.0
        return LoraTensors(dict(self.named_parameters()), self.scaling, dropout)


def hang_adapter(module: Any, adapter: ExpertAdapter | None) -> None:
    """Have an experts module use it; None: no more."""
    module._modules.pop(_CHILD, None)
    if adapter is not None:
        module.add_module(_CHILD, adapter)


def adapter_of(module: Any) -> ExpertAdapter | None:
    """What ``hang_adapter`` gave it, enabled or not."""
    found: ExpertAdapter | None = module._modules.get(_CHILD)
    return found


def hung_tensors(module: Any) -> list[LoraTensors]:
    """Of the adapter that a call of the module uses."""
    adapter = adapter_of(module)
    return [adapter.tensors()] if adapter is not None and adapter.is_enabled else []
