"""Least recently used leaves.

Source: R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger, "Evaluation techniques for storage
hierarchies", 1970.
"""

from __future__ import annotations

from ktk.placement.residency.policy import Blocked, Policy, Shape, first_free


class Lru(Policy):
    name = "lru"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._order: dict[int, None] = {}  # least recent first

    def hit(self, key: int) -> None:
        del self._order[key]
        self._order[key] = None

    def insert(self, key: int) -> None:
        self._order[key] = None

    def evict(self, is_blocked: Blocked) -> int:
        key = first_free(self._order, is_blocked)
        del self._order[key]
        return key

    def discard(self, key: int) -> None:
        del self._order[key]
