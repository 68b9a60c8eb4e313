"""A layer's output that activation checkpointing takes again instead of computing it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class CheckpointState(enum.Enum):
    """EMPTY: nothing kept. READY: an output is there. POISONED: a pass failed meanwhile."""

    EMPTY = "empty"
    READY = "ready"
    POISONED = "poisoned"


class CheckpointOutput:
    """At most one output, on the CPU."""

    def __init__(self) -> None:
        self.state = CheckpointState.EMPTY
        self._output: torch.Tensor | None = None

    def keep(self, output: torch.Tensor) -> None:
        """Copy an output (num_tokens, hidden_size). RuntimeError while it is poisoned."""
        if self.state is CheckpointState.POISONED:
            raise RuntimeError("a pass failed since the last clear(): clear() first")
        self._output = output.detach().to("cpu", copy=True)
        self.state = CheckpointState.READY

    def get(self, num_tokens: int, device: torch.device | None = None) -> torch.Tensor:
        """The output, on a device. RuntimeError unless one of so many tokens is there."""
        if self._output is None or self.state is not CheckpointState.READY:
            raise RuntimeError(f"no output is kept: the state is {self.state.name}")
        if len(self._output) != num_tokens:
            raise RuntimeError(f"the output kept has {len(self._output)} tokens, not {num_tokens}")
        return self._output if device is None else self._output.to(device)

    def poison(self) -> None:
        """A pass failed: what is kept may be of another one."""
        self._output, self.state = None, CheckpointState.POISONED

    def clear(self) -> None:
        """Forget the output, or the failure."""
        self._output, self.state = None, CheckpointState.EMPTY
