"""Batch invariance: what a model makes of a token has the same bits whatever other tokens are in
its batch.

torch's own functions do not promise that. Of a matrix product, the rows' bits depend on how many
there are and on how threads share them (fp32, MKL, two threads: other bits with 1 to 3, 5 to 7, 9
to 11 rows; bf16 by oneDNN has its own limits). sigmoid, silu and gelu take whole vectors by one
formula and what is left at the end of a thread's share by another. So while a model serves a batch,
ktk's kernels make the products, whose rows are computed alike, and those functions get whole
vectors only. The rest was measured on 1 to 512 rows and 1 to 7 threads (softmax, norms, exp, sin,
cos, tanh, topk): equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ktk.experts.stored import StoredMatrix
from ktk.integration.transformers.experts import is_experts
from ktk.integration.transformers.linear import SharedForward, class_source, linear_of
from ktk.ops import linear
from ktk.ops.linear import Linear

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Elements that a function gets at once: too few for torch to share them out between threads
# (32768), and whole vectors.
_PIECE = 1 << 14
_VECTOR = 64
_ROWS = 16  # of a product that torch makes, where ktk's kernels do not run
_CALLS = re.compile(r"\b(linear|silu|sigmoid|gelu|softplus|logsigmoid|mish|hardswish)\(")


class InvariantModel:
    """Changes a model's modules in place so that they are batch invariant, until ``undo``.

    invariant : modules that are already.
    """

    def __init__(self, model: torch.nn.Module, invariant: Collection[torch.nn.Module] = ()) -> None:
        self._changed: list[tuple[Any, str, Any]] = []  # object, attribute, what it had of its own
        try:
            for module in model.modules():
                if module in invariant:
                    continue
                forward = vars(module).get("forward")
                if isinstance(forward, SharedForward):
                    self._set(forward, "most_rows", math.inf)
                elif (forward_of_rows := _invariant(module)) is not None:
                    self._set(module, "forward", forward_of_rows)
        except BaseException:
            self.undo()
            raise

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._changed.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Leave the modules as they were."""
        while self._changed:
            owner, name, own = self._changed.pop()
            delattr(owner, name)
            if own is not None:
                setattr(owner, name, own)


def _invariant(module: torch.nn.Module) -> Callable[..., Any] | None:
    """What is to run instead of a module's forward,
    or None if that is invariant or no function here makes it so.
    """
    if linear_of(module) is not None or is_experts(module):
        return None
    if type(module) is torch.nn.Embedding:  # a table, though its docstring has a sigmoid
        return None
    if type(module) is torch.nn.Linear:
        return _Products(module)
    kind: Any = type(module)
    if _CALLS.search(class_source(kind)):
        return _Intercepted(module)
    return None


class _Products:
    """In place of a ``torch.nn.Linear``'s forward."""

    def __init__(self, module: torch.nn.Linear) -> None:
        self._module = module
        self._linear = _packed(module.weight, module.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _rows_alike(x, self._module.weight, self._module.bias, self._linear)


class _Intercepted(TorchFunctionMode):
    """In place of a module's forward: runs it, with functions that are not invariant replaced,
    in all that it calls, too.
    """

    _is_running = False  # in the generation thread, the only one that runs the model

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._module, self._forward = module, module.forward
        self._linears: dict[tuple[int, torch.dtype], Linear | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _Intercepted._is_running:
            return self._forward(*args, **kwargs)
        with self:
            return self._forward(*args, **kwargs)

    def __enter__(self) -> _Intercepted:
        _Intercepted._is_running = True
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _Intercepted._is_running = False
        super().__exit__(kind, error, trace)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **named)
        if func in _ELEMENTWISE:
            return _by_vectors(func, *args, **named)
        return func(*args, **named)

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """F.linear's arguments."""
        return _rows_alike(input, weight, bias, self._packed(weight, bias))

    def _packed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear | None:
        """The kernel's form of a weight, made once if it is a parameter,
        or one converted to another dtype as routers do for each call.
        """
        same_shape = [p for p in self._module.parameters() if p.shape == weight.shape]
        if len(same_shape) != 1:
            return _packed(weight, bias)
        key = id(same_shape[0]), weight.dtype
        if key not in self._linears:
            self._linears[key] = _packed(weight, bias)
        return self._linears[key]


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear | None:
    """A matrix for ktk's kernels on the memory it has, or None where they do not run it."""
    if weight.dtype not in _TYPES or weight.device.type != "cpu" or linear.why_not():
        return None
    rows = weight.detach().contiguous().view(torch.uint8).numpy()
    blocks = StoredMatrix.of_rows(_TYPES[weight.dtype], weight.shape[1], rows[None])
    return Linear.of_blocks(blocks, None if bias is None else bias.detach())


def _rows_alike(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: Linear | None
) -> torch.Tensor:
    """x (..., in_features) -> (..., out_features)."""
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if packed is not None:
        y = packed(rows)
    else:
        filled = F.pad(rows, (0, 0, 0, -len(rows) % _ROWS))
        y = torch.cat([F.linear(part, weight, bias) for part in filled.split(_ROWS)])[: len(rows)]
    return y.view(*x.shape[:-1], y.shape[-1])


def _by_vectors(function: Callable[..., Any], x: Any, *args: Any, **named: Any) -> Any:
    """An elementwise function of a tensor, its elements handed over in whole vectors."""
    if not isinstance(x, torch.Tensor) or not x.numel():
        return function(x, *args, **named)
    named.pop("inplace", None)
    flat = x.reshape(-1)
    filled = F.pad(flat, (0, -len(flat) % _VECTOR))
    parts = [function(part, *args, **named) for part in filled.split(_PIECE)]
    return torch.cat(parts)[: len(flat)].view(x.shape)


_ELEMENTWISE = {
    F.silu,
    F.sigmoid,
    F.gelu,
    F.softplus,
    F.logsigmoid,
    F.mish,
    F.hardswish,
    torch.sigmoid,
    torch.Tensor.sigmoid,
    torch.special.expit,
}
