"""2Q: a first-in-first-out queue for those used once, LRU for those that came back.

A key that leaves the queue is remembered; if it is used while it is, it joins the LRU part.
Source: T. Johnson, D. Shasha, "2Q: A low overhead high performance buffer management replacement
algorithm", 1994; the full version, whose sizes are Kin and Kout.
"""

from __future__ import annotations

from ktk.placement.residency.policy import (
    Blocked,
    Policy,
    Shape,
    check_share,
    first_free,
    share_of,
)


class TwoQueues(Policy):
    """a1_share : of the room, for those used once (Kin). ghost_share : of the room, how many that
    left are remembered (Kout).
    """

    name = "2q"
    aliases = ("twoq", "two-q")

    def __init__(self, shape: Shape, *, a1_share: float = 0.25, ghost_share: float = 0.5) -> None:
        super().__init__(shape)
        self._most_in = share_of(shape.capacity, check_share("a1_share", a1_share))
        self._most_out = share_of(shape.capacity, check_share("ghost_share", ghost_share))
        self._in: dict[int, None] = {}  # oldest first, as all here
        self._out: dict[int, None] = {}
        self._main: dict[int, None] = {}

    def hit(self, key: int) -> None:
        if key in self._main:
            del self._main[key]
            self._main[key] = None

    def insert(self, key: int) -> None:
        if key in self._out:
            del self._out[key]
            self._main[key] = None
        else:
            self._in[key] = None

    def evict(self, is_blocked: Blocked) -> int:
        queues = [self._main, self._in]
        if len(self._in) > self._most_in or not self._main:
            queues.reverse()
        key = first_free((key for queue in queues for key in queue), is_blocked)
        if key in self._main:
            del self._main[key]
            return key
        del self._in[key]
        self._out[key] = None
        if len(self._out) > self._most_out:
            del self._out[next(iter(self._out))]
        return key

    def discard(self, key: int) -> None:
        (self._main if key in self._main else self._in).pop(key)
