"""What another engine must offer to be measured beside ktk's layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from ktk.bench.layer import Caller, Layer, torch_peak
from ktk.bench.roofline import peak_of
from ktk.bench.shapes import Routing, Shape

SECONDS = 0.15  # of calls in a round


class Rival(Layer):
    """An engine that makes its own routings and takes its own times.

    arithmetic : "int8" or "bf16", what its products are. bytes_per_weight : scales included.
    Constructors raise RuntimeError with the reason if the engine cannot run.
    """

    def __init__(
        self, shape: Shape, method: str, kernel: str, bytes_per_weight: float, arithmetic: str
    ) -> None:
        self.method, self.backend, self.kernel = method, method.split(" ")[0], kernel
        self.expert_bytes = round(bytes_per_weight * shape.num_weights)
        self.layer_bytes = self.expert_bytes * shape.num_experts
        self.bits_per_weight = 8 * bytes_per_weight
        self.peak = torch_peak() if arithmetic == "bf16" else peak_of("", "int8")

    @abstractmethod
    def times(self, num_tokens: int) -> tuple[list[float], list[float]]:
        """Seconds and experts touched of a round's calls."""

    def verify(self, num_tokens: int) -> None:
        """RuntimeError if a batch of so many tokens comes out wrong; asked before all rounds."""

    def close(self) -> None:
        """End what runs."""

    def check(self, hidden: np.ndarray, routing: Routing) -> None:
        """``verify`` has."""

    def caller(self, hidden: np.ndarray, pool: list[Routing]) -> Caller:
        return RivalCaller(self, len(hidden))

    def prepare(self, hidden: np.ndarray, routing: Routing) -> tuple[Any, ...]:
        return ()

    def call(self, *arguments: Any) -> Any:
        raise NotImplementedError


class RivalCaller(Caller):
    def __init__(self, rival: Rival, num_tokens: int) -> None:
        self.rival = rival
        self.num_tokens = num_tokens

    def round(self) -> tuple[list[float], list[float]]:
        return self.rival.times(self.num_tokens)
