"""Parameters whose ``grad`` is a buffer that backward writes: no second copy of a gradient.

Between an optimiser's step and the next backward the parameters have no ``grad``: the window is
closed, and backward overwrites the buffers. Then each ``grad`` is its buffer: the window is open,
and later backwards add.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class OptimizerGrad(NamedTuple):
    """name : for messages. grad_view : a buffer, or a part of one, of the parameter's shape."""

    name: str
    parameter: torch.nn.Parameter
    grad_view: torch.Tensor


class OptimizerGrads:
    """The registered parameters of one layer.

    buffers : the gradients' own memory; every view must lie in it.
    """

    def __init__(self, buffers: Iterable[torch.Tensor]) -> None:
        self._buffers = list(buffers)
        self.entries: tuple[OptimizerGrad, ...] = ()

    def register(self, name: str, parameter: torch.nn.Parameter, grad_view: torch.Tensor) -> None:
        """Take a parameter; its ``grad`` is None from then on until a backward has run.

        Raises TypeError for what is no parameter or tensor, ValueError for a view that does not fit
        it or lies elsewhere, RuntimeError for what is registered already.
        """
        if not isinstance(parameter, torch.nn.Parameter):
            raise TypeError(f"{name} is a {type(parameter).__name__}: must be an nn.Parameter")
        if not isinstance(grad_view, torch.Tensor):
            raise TypeError(f"{name}'s grad view is a {type(grad_view).__name__}: must be a tensor")
        for what in ("shape", "dtype", "device"):
            own, other = getattr(parameter, what), getattr(grad_view, what)
            if own != other:
                raise ValueError(f"{name} has {what} {own}, its grad view {other}: must be equal")
        if not any(_holds(buffer, grad_view) for buffer in self._buffers):
            raise ValueError(
                f"{name}'s grad view is no part of the buffers given to init_lora_weights(): "
                "backward writes only those"
            )
        for entry in self.entries:
            if entry.parameter is parameter or entry.grad_view is grad_view:
                raise RuntimeError(f"{name}: registered already, as {entry.name}")
        parameter.grad = None
        self.entries = (*self.entries, OptimizerGrad(name, parameter, grad_view))

    def state(self) -> str:
        """ "empty": nothing is registered; "closed"; "open".

        RuntimeError where some are open and others closed, or a ``grad`` is something else.
        """
        if not self.entries:
            return "empty"
        for name, parameter, view in self.entries:
            if parameter.grad is not None and parameter.grad is not view:
                raise RuntimeError(
                    f"{name}: its grad is another tensor than the one that was registered: leave "
                    "the registered one, or set all grads to None"
                )
        num_open = sum(entry.parameter.grad is not None for entry in self.entries)
        if 0 < num_open < len(self.entries):
            raise RuntimeError(
                f"{num_open} of {len(self.entries)} registered parameters have their grad, the "
                "others none: set all to None, or none"
            )
        return "open" if num_open else "closed"

    def publish(self) -> None:
        """Open the window."""
        for entry in self.entries:
            entry.parameter.grad = entry.grad_view

    def release(self) -> None:
        """Close it; the buffers keep what they hold."""
        for entry in self.entries:
            entry.parameter.grad = None


def _holds(buffer: torch.Tensor, view: torch.Tensor) -> bool:
    start = view.data_ptr() - buffer.data_ptr()
    return 0 <= start <= buffer.nbytes - view.nbytes and view.is_contiguous()
