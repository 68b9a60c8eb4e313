"""S3-FIFO: a small queue that sifts out those used once, a main queue, a queue of those that left.

Source: J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache
eviction", 2023.
"""

from __future__ import annotations

from ktk.placement.residency.policy import Blocked, Policy, Shape, check_share, share_of


class S3Fifo(Policy):
    """small_share : of the room, for those that came new. ghost_share : of the room, how many that
    left are remembered. promote_at : uses in the small queue that bring a key into the main one.
    most_uses : counted no further.
    """

    name = "s3fifo"
    aliases = ("s3-fifo",)

    def __init__(
        self,
        shape: Shape,
        *,
        small_share: float = 0.1,
        ghost_share: float = 1.0,
        promote_at: int = 2,
        most_uses: int = 3,
    ) -> None:
        super().__init__(shape)
        if ghost_share <= 0 or not 1 <= promote_at <= most_uses:
            raise ValueError(
                f"ghost_share={ghost_share}, promote_at={promote_at}, most_uses={most_uses}: must "
                "be above 0, and 1 <= promote_at <= most_uses"
            )
        self._most_small = share_of(shape.capacity, check_share("small_share", small_share))
        self._most_ghosts = share_of(shape.capacity, ghost_share)
        self._promote_at, self._most_uses = promote_at, most_uses
        self._small: dict[int, int] = {}  # uses since it came; oldest first, as below
        self._main: dict[int, int] = {}
        self._ghosts: dict[int, None] = {}

    def hit(self, key: int) -> None:
        queue = self._main if key in self._main else self._small
        queue[key] = min(queue[key] + 1, self._most_uses)

    def insert(self, key: int) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def evict(self, is_blocked: Blocked) -> int:
        while True:
            from_small = len(self._small) >= self._most_small or not self._main
            key = self._from_small(is_blocked) if from_small else self._from_main(is_blocked)
            if key is None:  # all that are left there are blocked
                key = self._from_main(is_blocked) if from_small else self._from_small(is_blocked)
                if key is None:
                    raise LookupError("every expert in memory is in use")
            if key >= 0:
                return key

    def _from_small(self, is_blocked: Blocked) -> int | None:
        """The key that leaves; -1 after one went into the main queue; None if all are blocked."""
        for key, uses in self._small.items():
            if is_blocked(key):
                continue
            del self._small[key]
            if uses >= self._promote_at:
                self._main[key] = 0
                return -1
            self._ghosts[key] = None
            if len(self._ghosts) > self._most_ghosts:
                del self._ghosts[next(iter(self._ghosts))]
            return key
        return None

    def _from_main(self, is_blocked: Blocked) -> int | None:
        """The key that leaves, after those used have gone round; None if all are blocked."""
        for key in list(self._main) * (self._most_uses + 1):
            if is_blocked(key):
                continue
            uses = self._main.pop(key)
            if not uses:
                return key
            self._main[key] = uses - 1
        return None

    def discard(self, key: int) -> None:
        (self._main if key in self._main else self._small).pop(key)
