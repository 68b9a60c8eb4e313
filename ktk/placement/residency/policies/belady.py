"""Belady's optimum: who is used again the latest leaves. It knows the future: a bound for replays.

No policy that reads experts only when a call needs them has fewer misses, if a call's experts fit
into the room together. Source: L. A. Belady, "A study of replacement algorithms for a
virtual-storage computer", 1966.
"""

from __future__ import annotations

import heapq
from collections import deque

from ktk.placement.residency.policy import Blocked, Policy, Shape


class Belady(Policy):
    name = "belady"
    aliases = ("opt", "min")
    is_offline = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._now = -1
        self._never = 0
        self._uses: dict[int, deque[int]] = {}
        self._next: dict[int, int] = {}  # of who is in memory
        self._heap: list[tuple[int, int]] = []  # (-next use, key); outdated ones stay in it

    def foresee(self, calls: list[list[int]]) -> None:
        """The experts of every call there will be, in their order, before the first ``begin``."""
        self._never = len(calls)
        for index, keys in enumerate(calls):
            for key in keys:
                self._uses.setdefault(key, deque()).append(index)

    def begin(self, layer: int, keys: list[int]) -> None:
        self._now += 1
        for key in keys:
            self._uses[key].popleft()

    def hit(self, key: int) -> None:
        uses = self._uses[key]
        self._next[key] = uses[0] if uses else self._never
        heapq.heappush(self._heap, (-self._next[key], key))

    insert = hit

    def evict(self, is_blocked: Blocked) -> int:
        passed: list[tuple[int, int]] = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            if self._next.get(entry[1]) != -entry[0]:
                continue
            if is_blocked(entry[1]):
                passed.append(entry)
            else:
                found = entry[1]
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if found is None:
            raise LookupError("every expert in memory is in use")
        self.discard(found)
        return found

    def discard(self, key: int) -> None:
        del self._next[key]
