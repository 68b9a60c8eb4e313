"""The linear layers around the experts through ktk's kernels: attention projections,
shared experts, dense layers, lm_head.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ktk.experts.stored import StoredMatrix
from ktk.integration.choices import check_linear
from ktk.ops import linear
from ktk.ops.linear import Linear

log = logging.getLogger("ktk")

# Rounding routers sends tokens to other experts. Below SMALLEST a matrix is a router under another
# name, or a gate.
SMALLEST = 1 << 14  # weights
_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")


class KtkLinear(torch.nn.Module):
    """In place of a ``torch.nn.Linear`` of ``dtype``.

    Inference only; its weights are no parameters.
    """

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._ktk = linear
        self.dtype = dtype

    @classmethod
    def pack(cls, module: torch.nn.Linear, weight_format: str) -> KtkLinear:
        """The module's weights quantised.

        Raises ValueError for an unknown format, TypeError if they are not float.
        """
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
                "a linear layer run by ktk has no gradient: load the model without linear= (of a "
                "GGUF file with "
                'linear="none"), or call it under torch.no_grad()'
            )
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = self._ktk(rows if rows.device.type == "cpu" else rows.cpu())
        return y.to(x.device).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return repr(self._ktk)


_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16"}
# Of a bf16 product: from more rows on torch's is faster, by 4 to 30 %; up to four ktk's is, by 1.2
# to 2.8 times.
MOST_ROWS = 16


class SharedForward:
    """In place of a ``torch.nn.Linear``'s ``forward``: ktk's kernels on the module's own bf16 or
    fp16 weight, where it lies.

    With gradients, on another device, with a weight of another dtype or more rows than
    ``most_rows`` the module's own forward runs.
    """

    def __init__(self, module: torch.nn.Linear) -> None:
        self.module, self.own_forward = module, module.forward
        self.most_rows: float = MOST_ROWS if module.weight.dtype is torch.bfloat16 else math.inf
        self.linear = self._shared()

    def _shared(self) -> Linear:
        weight, bias = self.module.weight.detach(), self.module.bias
        self._address = weight.data_ptr()
        rows = weight.view(torch.uint8).numpy()
        blocks = StoredMatrix.of_rows(_TYPES[weight.dtype], self.module.in_features, rows[None])
        return Linear.of_blocks(blocks, None if bias is None else bias.detach())

    @property
    def is_stale(self) -> bool:
        """Whether the module has another weight by now."""
        return self.module.weight.data_ptr() != self._address

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module, weight = self.module, self.module.weight
        if x.dtype is not weight.dtype or x.device.type != "cpu" or torch.is_grad_enabled():
            return self.own_forward(x)
        if x.numel() > self.most_rows * module.in_features:
            return self.own_forward(x)
        if self.is_stale:
            if not _can_be_shared(module):
                return self.own_forward(x)
            self.linear = self._shared()
        y: torch.Tensor = self.linear(x.reshape(-1, module.in_features))
        return y.view(*x.shape[:-1], module.out_features)


def _can_be_shared(module: torch.nn.Module) -> bool:
    weight = module.weight
    return (
        isinstance(weight, torch.Tensor)
        and weight.device.type == "cpu"
        and weight.dtype in _TYPES
        and weight.is_contiguous()
    )


def share_linears(model: torch.nn.Module) -> list[str]:
    """Have ktk's kernels run the model's bf16 and fp16 ``torch.nn.Linear`` modules on the weights
    they have; their names.

    Nothing is copied, but matrices whose out_features are no multiple of 16. What
    ``replace_linears`` leaves alone is left alone.
    """
    if linear.why_not():
        return []
    shared = []
    for name, module in _dense_linears(model):
        if linear_of(module) is None and _can_be_shared(module):
            if isinstance(module.forward, SharedForward):  # of another weight
                del module.forward
            module.forward = SharedForward(module)  # type: ignore[method-assign, assignment]
        if linear_of(module) is not None:
            shared.append(name)
    return shared


def run_linears(model: torch.nn.Module, choice: str) -> list[str]:
    """Have a model's linear layers run as a choice of ``ktk.integration.choices.LINEAR`` says;
    the names of those that ktk runs.
    """
    check_linear(choice)
    if choice == "none":
        return []
    return share_linears(model) if choice == "file" else replace_linears(model, choice)


def linear_of(module: Any) -> Linear | None:
    """The ``ktk.ops.linear.Linear`` that runs a linear layer, or None if torch does."""
    if isinstance(module, KtkLinear):
        return module._ktk
    forward = getattr(module, "forward", None)
    if isinstance(forward, SharedForward) and not forward.is_stale:
        return forward.linear
    return None


def is_dense(name: str, shape: Sequence[int]) -> bool:
    """Whether a linear layer of this name, whose weight has this shape,
    is one for ktk's kernels: no router, no gate.
    """
    return math.prod(shape) >= SMALLEST and _ROUTERS.search(name) is None


def _is_read_elsewhere(model: torch.nn.Module, owner_name: str, own: str) -> bool:
    """Whether a module that holds this linear layer uses its parameters besides calling it:
    latent attention, some routers.
    """
    reads = re.compile(rf"\.{re.escape(own)}\.(weight|bias)\b")
    owners = owner_name.split(".") if owner_name else []
    kinds: list[Any] = [
        type(model.get_submodule(".".join(owners[:n]))) for n in range(len(owners) + 1)
    ]
    return any(reads.search(class_source(kind)) for kind in kinds)


@functools.cache
def class_source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return ""


def replace_linears(
    model: torch.nn.Module, weight_format: str, skip: tuple[str, ...] = ()
) -> list[str]:
    """Pack the model's ``torch.nn.Linear`` modules in place, freeing their float weights one by
    one.

    weight_format : a name of ``ktk.experts.formats.PANELS``. skip : endings of modules' names to
    leave alone. Routers and matrices of less than ``SMALLEST`` weights stay as they are, as do
    those whose weights other code reads, and so does everything, with a warning, where ktk's
    kernels do not run.
    Returns the names of those replaced. Raises ValueError for an unknown format, TypeError if a
    weight is not float.
    """
    if reason := linear.why_not():
        log.warning("linear layers stay with torch: %s", reason)
        return []
    replaced = []
    for name, module in _dense_linears(model, skip):
        owner_name, _, own = name.rpartition(".")
        try:
            packed = KtkLinear.pack(module, weight_format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        setattr(model.get_submodule(owner_name), own, packed)
        replaced.append(name)
    return replaced


def _dense_linears(
    model: torch.nn.Module, skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or not is_dense(name, module.weight.shape):
            continue
        if name.endswith(skip or ("\0",)):
            continue
        owner_name, _, own = name.rpartition(".")
        if _is_read_elsewhere(model, owner_name, own):
            log.info("%s stays with torch: its owner's code reads its weight", name)
            continue
        yield name, module
