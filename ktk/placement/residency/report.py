"""What there is to see of a model whose experts come and go."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Counters:
    """Since the slots were made. An expert counts once a call.

    hits : resident when the call came. cold, in_flight : not, or on the way by then; both are
    misses. evictions : who left for another. prefetches : begun before a call asked; of those,
    prefetch_hits : used by the next call of their layer; cancelled : never read, or of ``fill``.
    reads, read_bytes : that succeeded. failures : that did not. waits : calls that waited for room.
    """

    hits: int = 0
    cold: int = 0
    in_flight: int = 0
    evictions: int = 0
    prefetches: int = 0
    prefetch_hits: int = 0
    cancelled: int = 0
    reads: int = 0
    read_bytes: int = 0
    failures: int = 0
    waits: int = 0

    @property
    def misses(self) -> int:
        return self.cold + self.in_flight

    @property
    def uses(self) -> int:
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """0 to 1; 0 without uses."""
        return self.hits / self.uses if self.uses else 0.0


@dataclass(frozen=True)
class ResidencyReport:
    """One moment of some slots.

    policy : its name. is_direct : whether reads go past the page cache. num_experts : of all
    layers. capacity : that have a slot of slot_bytes. resident : that are in memory now.
    """

    policy: str
    is_direct: bool
    num_experts: int
    capacity: int
    slot_bytes: int
    resident: int
    counters: Counters

    def to_json(self) -> dict[str, Any]:
        counted = asdict(self.counters)
        more = {
            "misses": self.counters.misses,
            "uses": self.counters.uses,
            "hit_rate": round(self.counters.hit_rate, 4),
        }
        return {**asdict(self), "counters": {**counted, **more}}

    def line(self) -> str:
        """``room for 48 of 64 experts (3.2 of 4.3 GB), policy lrfu, direct I/O``."""
        in_memory, of_all = (n * self.slot_bytes / 1e9 for n in (self.capacity, self.num_experts))
        how = "direct I/O" if self.is_direct else "no direct I/O: the file system takes none"
        return (
            f"room for {self.capacity} of {self.num_experts} experts ({in_memory:.2f} of "
            f"{of_all:.2f} GB), policy {self.policy}, {how}"
        )

    def use(self) -> str:
        """``93.1 % of 1,536 uses found their expert in memory, 0.28 GB were read``."""
        c = self.counters
        return (
            f"{c.hit_rate:.1%} of {c.uses:,} uses found their expert in memory, "
            f"{c.read_bytes / 1e9:.2f} GB were read"
        )
