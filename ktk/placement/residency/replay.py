"""What policies would have hit, had they run a trace: no experts are read, only counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from ktk.placement.residency.pools import PoolOptions, Pools
from ktk.placement.residency.trace import Call, Trace


@dataclass
class Counts:
    """Uses of experts in calls, each expert counted once a call.

    hits : in memory when the call began. misses : not. evictions : who left for another.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def uses(self) -> int:
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """0 to 1; 0 without uses."""
        return self.hits / self.uses if self.uses else 0.0


@dataclass
class Replay:
    """One policy's counts over a trace, of all layers and of each."""

    options: PoolOptions
    total: Counts = field(default_factory=Counts)
    layers: list[Counts] = field(default_factory=list)


def replay(trace: Trace, options: PoolOptions, calls: list[Call] | None = None) -> Replay:
    """Runs a trace through pools that are empty at first.

    calls : ``list(trace.each_call())``, to make it once for many replays. A call with more experts
    than fit goes in waves, who is in memory first. ValueError as ``Pools``.
    """
    pools = Pools(options, trace.num_layers, trace.num_experts, trace.top_k)
    calls = list(trace.each_call()) if calls is None else calls
    pools.foresee([(call.layer, call.keys) for call in calls])
    result = Replay(options, layers=[Counts() for _ in range(trace.num_layers)])
    for call in calls:
        counts = result.layers[call.layer]
        pools.begin(call.layer, call.keys, call.scores)
        present = [key for key in call.keys if key in pools]
        absent = [key for key in call.keys if key not in pools]
        counts.hits += len(present)
        counts.misses += len(absent)
        for wave in waves([*present, *absent], pools.room(call.layer)):
            used = frozenset(wave)
            for key in wave:
                if key in pools:
                    pools.hit(key)
                else:
                    counts.evictions += pools.admit(key, used.__contains__) is not None
    for counts in result.layers:
        result.total.hits += counts.hits
        result.total.misses += counts.misses
        result.total.evictions += counts.evictions
    return result


def waves(keys: list[int], room: int) -> list[list[int]]:
    """The keys in their order, cut so that each part fits into the room."""
    return [keys[start : start + room] for start in range(0, len(keys), room)]
