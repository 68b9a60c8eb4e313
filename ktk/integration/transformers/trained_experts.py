"""Experts that are trained in full: parameters of torch's, which it runs beside the packed others.

They hang on the experts module as a child; calls of the packed experts pass them over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from ktk.experts.stored import ExpertWeights
from ktk.integration.transformers.activations import join_gate_up
from ktk.integration.transformers.experts import has_post_norm

_CHILD = "ktk_trained"


class TrainedExperts(torch.nn.Module):
    """Some of a layer's experts: parameters gate, up (experts, I, H), down (experts, H, I), and
    gate_bias and so on (experts, out_features) where there are such.

    experts : their numbers, ascending.
    """

    def __init__(
        self, experts: Sequence[int], weights: Sequence[ExpertWeights], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.experts = tuple(experts)
        for name, first in weights[0]._asdict().items():
            if first is not None:
                arrays = [getattr(of, name) for of in weights]
                stacked = torch.from_numpy(np.stack(arrays)).to(dtype)
                self.register_parameter(name, torch.nn.Parameter(stacked))

    def weights(self, at: int) -> ExpertWeights:
        """One of them, float32 arrays. at : which, from 0."""
        found = {n: p[at].detach().float().cpu().numpy() for n, p in self.named_parameters()}
        return ExpertWeights(found.pop("gate", None), **found)

    def others(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """The same ids, -1 in place of these experts': what the packed ones run."""
        own = torch.tensor(self.experts, device=top_k_index.device)
        return top_k_index.masked_fill(torch.isin(top_k_index, own), -1)

    def add_to(
        self,
        out: torch.Tensor,
        module: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """``out``, that of the others, and these experts' share, expert by expert, summed in
        float32. module : whose activation, and norm of outputs, they have.
        """
        total = out.float()
        for at, number in enumerate(self.experts):
            token, slot = torch.nonzero(top_k_index == number, as_tuple=True)
            if len(token):
                y = self._expert(module, at, hidden_states[token])
                total = total.index_add(0, token, y * top_k_weights[token, slot, None].float())
        return total.to(out.dtype)

    def _expert(self, module: Any, at: int, x: torch.Tensor) -> torch.Tensor:
        """float32 (rows, H) of hidden states (rows, H)."""
        of = {name: p[at].to(x.device) for name, p in self.named_parameters()}

        def project(name: str, x: torch.Tensor) -> torch.Tensor:
            return linear(x.to(of[name].dtype), of[name], of.get(f"{name}_bias"))

        up = project("up", x)
        if module.has_gate:
            gate_up = join_gate_up(project("gate", x), up, module.is_concatenated)
            h = module._apply_gate(gate_up)
        else:
            h = module.act_fn(up)
        y = project("down", h).float()
        return module.post_expert_norm(y).float() if has_post_norm(module) else y


def hang_trained(module: Any, trained: TrainedExperts | None) -> None:
    """Have an experts module use them; None: no more."""
    module._modules.pop(_CHILD, None)
    if trained is not None:
        module.add_module(_CHILD, trained)


def trained_of(module: Any) -> TrainedExperts | None:
    """What ``hang_trained`` gave it."""
    found: TrainedExperts | None = module._modules.get(_CHILD)
    return found
