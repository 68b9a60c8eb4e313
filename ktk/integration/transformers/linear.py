"""The linear layers around the experts through ktk's kernels: attention projections, shared experts, dense layers, lm_head."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from ktk import linear
from ktk.linear import Linear

log = logging.getLogger("ktk")

# A smaller matrix gains nothing, and routers are such: rounding them sends tokens to other experts.
SMALLEST = 1 << 19  # weights
_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")


class KtkLinear(torch.nn.Module):
    """In place of a ``torch.nn.Linear`` of ``dtype``. Inference only; its weights are no parameters."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._ktk = linear
        self.dtype = dtype

    @classmethod
    def pack(cls, module: torch.nn.Linear, weight_format: str) -> KtkLinear:
        """The module's weights quantised. Raises ValueError for an unknown format, TypeError if they are not float."""
        bias = None if module.bias is None else module.bias.detach()
        packed = Linear(module.weight.detach(), bias, weight_format=weight_format)
        return cls(packed, module.weight.dtype)

    @property
    def kernel(self) -> str:
        """What runs it, e.g. "avx512vnni int8"."""
        return self._ktk.kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in x's dtype and device."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a linear layer run by ktk has no gradient: load the model without linear= (of a GGUF file with "
                'linear="none"), or call it under torch.no_grad()'
            )
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = self._ktk(rows if rows.device.type == "cpu" else rows.cpu())
        return y.to(x.device).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return repr(self._ktk)


def is_dense(name: str, shape: Sequence[int]) -> bool:
    """Whether a linear layer of this name, whose weight has this shape, gains by ktk's kernels: it is large, and no router."""
    return math.prod(shape) >= SMALLEST and _ROUTERS.search(name) is None


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
        if type(module) is not torch.nn.Linear or not is_dense(name, module.weight.shape):
            continue
        if name.endswith(skip or ("\0",)):
            continue
        owner_name, _, own = name.rpartition(".")
        owner: Any = model.get_submodule(owner_name)
        try:
            packed = KtkLinear.pack(module, weight_format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        setattr(owner, own, packed)
        replaced.append(name)
    return replaced
