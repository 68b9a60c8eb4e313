"""The linear layers around the experts through ktk's kernels: attention projections, shared experts, lm_head."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from ktk import linear
from ktk.linear import Linear

log = logging.getLogger("ktk")

# A smaller matrix gains nothing, and routers are such: rounding them sends tokens to other experts.
SMALLEST = 1 << 19  # weights
_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")


class KtkLinear(torch.nn.Module):
    """In place of a ``torch.nn.Linear``. Inference only; its packed weights are no parameters."""

    def __init__(self, module: torch.nn.Linear, weight_format: str) -> None:
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        bias = None if module.bias is None else module.bias.detach()
        self._ktk = Linear(module.weight.detach(), bias, weight_format=weight_format)
        self.dtype = module.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in x's dtype and device."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a linear layer packed by ktk has no gradient: load the model without linear=, or call it under torch.no_grad()"
            )
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = self._ktk(rows if rows.device.type == "cpu" else rows.cpu())
        return y.to(x.device).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return repr(self._ktk)


def replace_linears(
    model: torch.nn.Module, weight_format: str, skip: tuple[str, ...] = ()
) -> list[str]:
    """Pack the model's ``torch.nn.Linear`` modules in place, freeing their float weights one by one.

    weight_format : a name of ``ktk.formats.FORMATS``. skip : endings of modules' names to leave alone. Routers and matrices of
    less than ``SMALLEST`` weights stay as they are, and so does everything, with a warning, where ktk's kernels do not run.
    Returns the names of those replaced. Raises ValueError for an unknown format, TypeError if a weight is not float.
    """
    if reason := linear.why_not():
        log.warning("linear layers stay with torch: %s", reason)
        return []
    replaced = []
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module.weight.numel() < SMALLEST:
            continue
        if _ROUTERS.search(name) or name.endswith(skip or ("\0",)):
            continue
        owner_name, _, own = name.rpartition(".")
        owner: Any = model.get_submodule(owner_name)
        try:
            packed = KtkLinear(module, weight_format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        setattr(owner, own, packed)
        replaced.append(name)
    return replaced
