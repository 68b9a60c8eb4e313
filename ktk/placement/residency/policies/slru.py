"""Segmented LRU: those used again are protected from those used once.

Source: R. Karedla, J. S. Love, B. G. Wherry, "Caching strategies to improve disk system
performance", 1994.
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


class Segments:
    """Two LRU lists: one use brings a key onto probation, the next into the protected part,
    whose least recent goes back.
    """

    def __init__(self, most_protected: int) -> None:
        self.most_protected = most_protected
        self.probation: dict[int, None] = {}  # least recent first, as below
        self.protected: dict[int, None] = {}

    def __contains__(self, key: int) -> bool:
        return key in self.probation or key in self.protected

    def hit(self, key: int) -> None:
        (self.protected if key in self.protected else self.probation).pop(key)
        self.protected[key] = None
        if len(self.protected) > self.most_protected:
            back = next(iter(self.protected))
            del self.protected[back]
            self.probation[back] = None

    def insert(self, key: int) -> None:
        self.probation[key] = None

    def victim(self, is_blocked: Blocked) -> int:
        both = (self.probation, self.protected)
        return first_free((key for part in both for key in part), is_blocked)

    def discard(self, key: int) -> None:
        (self.protected if key in self.protected else self.probation).pop(key)


class Slru(Policy):
    """protected_share : of the room."""

    name = "slru"

    def __init__(self, shape: Shape, *, protected_share: float = 0.8) -> None:
        super().__init__(shape)
        share = check_share("protected_share", protected_share)
        self._segments = Segments(share_of(shape.capacity, share))

    def hit(self, key: int) -> None:
        self._segments.hit(key)

    def insert(self, key: int) -> None:
        self._segments.insert(key)

    def evict(self, is_blocked: Blocked) -> int:
        key = self._segments.victim(is_blocked)
        self._segments.discard(key)
        return key

    def discard(self, key: int) -> None:
        self._segments.discard(key)
