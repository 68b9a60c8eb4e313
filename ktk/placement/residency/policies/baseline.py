"""Baseline: the experts with the highest moving average of use stay; ties go round.

It is the rule of expert caches that keep a hot set. The average of an expert moves with each call
of its layer: by alpha towards 1 if the call uses it, else towards 0.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ktk.placement.residency.policy import Blocked, Policy, Shape, check_share


class Baseline(Policy):
    """alpha : weight of the newest call."""

    name = "baseline"
    aliases: ClassVar[tuple[str, ...]] = (
        "default",
        "current",
        "current_ema",
        "ema",
        "ema_hotset",
        "legacy",
    )

    def __init__(self, shape: Shape, *, alpha: float = 0.01) -> None:
        super().__init__(shape)
        self._keep = 1 - check_share("alpha", alpha)
        self._average = np.zeros((shape.num_layers, shape.num_experts), np.float64)
        self._resident = np.zeros(shape.num_keys, bool)
        self._next = 0  # where the round of ties goes on

    def begin(self, layer: int, keys: list[int]) -> None:
        self._average[layer] *= self._keep
        experts = np.asarray(keys, np.int64) - layer * self.shape.num_experts
        self._average[layer, experts] += 1 - self._keep

    def hit(self, key: int) -> None:
        """``begin`` has counted the use."""

    def insert(self, key: int) -> None:
        self._resident[key] = True

    def evict(self, is_blocked: Blocked) -> int:
        left = np.where(self._resident, self._average.reshape(-1), np.inf)
        left = np.concatenate((left[self._next :], left[: self._next]))
        while left[at := int(left.argmin())] < np.inf:
            key = (at + self._next) % len(left)
            if not is_blocked(key):
                self._resident[key] = False
                self._next = key + 1
                return key
            left[at] = np.inf
        raise LookupError("every expert in memory is in use")

    def discard(self, key: int) -> None:
        self._resident[key] = False
