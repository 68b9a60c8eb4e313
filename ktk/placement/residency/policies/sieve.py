"""SIEVE: a queue, a bit for each key, and a hand that goes from the tail to the head.

The hand clears the bit of those used since it last came by and takes the first without one; there
it stays. A blocked key keeps its bit.
Source: Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than LRU", 2024.
"""

from __future__ import annotations

from ktk.placement.residency.policy import Blocked, Policy, Shape

_NONE = -1


class Sieve(Policy):
    name = "sieve"

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._is_used: dict[int, bool] = {}
        # A list linked both ways: what stands on a key's side of the head, and of the tail.
        self._newer: dict[int, int] = {}
        self._older: dict[int, int] = {}
        self._head = self._tail = self._hand = _NONE

    def hit(self, key: int) -> None:
        self._is_used[key] = True

    def insert(self, key: int) -> None:
        self._is_used[key] = False
        self._newer[key], self._older[key] = _NONE, self._head
        if self._head != _NONE:
            self._newer[self._head] = key
        else:
            self._tail = key
        self._head = key

    def evict(self, is_blocked: Blocked) -> int:
        for _ in range(2 * len(self._is_used)):  # one round may only clear bits
            key = self._hand if self._hand != _NONE else self._tail
            self._hand = self._newer[key]
            if is_blocked(key):
                continue
            if not self._is_used[key]:
                self.discard(key)
                return key
            self._is_used[key] = False
        raise LookupError("every expert in memory is in use")

    def discard(self, key: int) -> None:
        newer, older = self._newer.pop(key), self._older.pop(key)
        del self._is_used[key]
        if newer != _NONE:
            self._older[newer] = older
        else:
            self._head = older
        if older != _NONE:
            self._newer[older] = newer
        else:
            self._tail = newer
        if self._hand == key:
            self._hand = newer
