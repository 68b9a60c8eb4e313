"""W-TinyLFU: a small LRU window before a segmented LRU, which the more frequent of two may enter.

Experts are few, so that their uses are counted exactly and not in a sketch.
Source: G. Einziger, R. Friedman, B. Manes, "TinyLFU: A highly efficient cache admission policy",
2017.
"""

from __future__ import annotations

import numpy as np

from ktk.placement.residency.policies.slru import Segments
from ktk.placement.residency.policy import Blocked, Policy, Shape, check_share, share_of


class WTinyLfu(Policy):
    """window_share : of the room. protected_share : of the room behind the window. decay_every :
    uses after which all counts are halved.
    """

    name = "w_tinylfu"
    aliases = ("wtinylfu", "w-tinylfu")

    def __init__(
        self,
        shape: Shape,
        *,
        window_share: float = 0.1,
        protected_share: float = 0.8,
        decay_every: int = 1000,
    ) -> None:
        super().__init__(shape)
        if decay_every < 1:
            raise ValueError(f"decay_every={decay_every}: must be at least 1")
        self._most_window = share_of(shape.capacity, check_share("window_share", window_share))
        share = check_share("protected_share", protected_share)
        self._window: dict[int, None] = {}  # least recent first
        self._main = Segments(share_of(max(1, shape.capacity - self._most_window), share))
        self._uses = np.zeros(shape.num_keys, np.int64)
        self._decay_every, self._until_decay = decay_every, decay_every

    def _count(self, key: int) -> None:
        self._uses[key] += 1
        self._until_decay -= 1
        if not self._until_decay:
            self._uses >>= 1
            self._until_decay = self._decay_every

    def hit(self, key: int) -> None:
        self._count(key)
        if key in self._main:
            self._main.hit(key)
        else:
            del self._window[key]
            self._window[key] = None

    def insert(self, key: int) -> None:
        self._count(key)
        if len(self._window) >= self._most_window:
            oldest = next(iter(self._window))
            del self._window[oldest]
            self._main.insert(oldest)
        self._window[key] = None

    def evict(self, is_blocked: Blocked) -> int:
        """With a full window its oldest and the main part's victim are weighed: the less frequent
        leaves, the candidate if they are equal.
        """
        candidate = next((key for key in self._window if not is_blocked(key)), None)
        try:
            victim = self._main.victim(is_blocked)
        except LookupError:
            if candidate is None:
                raise
            del self._window[candidate]
            return candidate
        if candidate is None or len(self._window) < self._most_window:
            self._main.discard(victim)
            return victim
        del self._window[candidate]
        if self._uses[candidate] > self._uses[victim]:
            self._main.discard(victim)
            self._main.insert(candidate)
            return victim
        return candidate

    def discard(self, key: int) -> None:
        if key in self._main:
            self._main.discard(key)
        else:
            del self._window[key]
