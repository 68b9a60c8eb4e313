"""Which experts are worth reading before their layer's call: learned from what calls did with them.

The next layer's router, given this layer's input, names experts, the best first. How often a call
uses one that was named and not in memory is learned by layer and rank, whether it was read or not.
What reading ahead saves and costs is measured in seconds of the calls' waiting: one that the call
uses saves its head start; one that it does not use costs as long as its read goes on beside the
call's own, and a whole read each time that who left for it is wanted while it lies there unused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

KEEP = 0.98  # of what is known, with each new observation: fifty of them count
DOUBT = 8  # observations that are made up at first: saving and cost alike
FADE = 1 - 1 / 4096  # with each call: what did not pay is tried again


class Ahead:
    """Of ``num_layers`` layers; keys as of ``Residents``. Not thread-safe.

    clock : seconds.
    """

    def __init__(self, num_layers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._named: list[dict[int, int]] = [{} for _ in range(num_layers)]  # cold key: its rank
        self._chances: list[dict[int, float]] = [{} for _ in range(num_layers)]  # by rank
        self._begun: dict[int, float] = {}  # when each key's read began
        self._late: dict[int, float] = {}  # since when reads run beside a call that has no use
        self._ended: dict[int, float] = {}
        self._left_for: dict[int, int] = {}  # who left, and for whom
        self._unused: set[int] = set()  # in memory, and their layer's call had no use for them
        self._saved = self._cost = self._num_used = self._num_useless = 0.0
        self._read_seconds = 1e-3

    @property
    def threshold(self) -> float:
        """The chance from which on an expert is worth it."""
        saved = (self._saved + DOUBT * self._read_seconds) / (self._num_used + DOUBT)
        cost = (self._cost + DOUBT * self._read_seconds) / (self._num_useless + DOUBT)
        return cost / (saved + cost) if saved + cost else 1.0

    def worthy(self, layer: int, named: Sequence[int], top_k: int) -> list[int]:
        """Of the cold keys that a router named, the best of each row first, those to read, the
        likeliest first.

        named : keys, -1 in place of what is in memory; of each row top_k.
        """
        chances = self._chances[layer]
        ranks: dict[int, int] = {}
        for at, key in enumerate(named):
            if key >= 0:
                ranks[key] = min(at % top_k, ranks.get(key, top_k))
        self._named[layer] = ranks
        threshold = self.threshold
        found = [key for key, rank in ranks.items() if chances.get(rank, 0.5) >= threshold]
        found.sort(key=lambda key: -chances.get(ranks[key], 0.5))
        return found

    def begin(self, key: int, victim: int | None) -> None:
        """Its read begins; the victim left for it."""
        self._begun[key] = self._clock()
        if victim is not None:
            self._left_for[victim] = key

    def end(self, key: int) -> None:
        """Its read ended, was stopped or has failed."""
        now = self._clock()
        if (late := self._late.pop(key, None)) is not None:
            self._cost += now - late
        elif (begun := self._begun.get(key)) is not None:
            self._ended[key] = now
            self._read_seconds += (1 - KEEP) * (now - begun - self._read_seconds)

    def call(self, layer: int, keys: Collection[int]) -> None:
        """A call of the layer came that uses these."""
        fade = FADE
        self._saved, self._num_used = self._saved * fade, self._num_used * fade
        self._cost, self._num_useless = self._cost * fade, self._num_useless * fade
        if self._named[layer]:
            chances = self._chances[layer]
            for key, rank in self._named[layer].items():
                before = chances.get(rank, 0.5)
                chances[rank] = before + (1 - KEEP) * ((key in keys) - before)
            self._named[layer] = {}
        if self._unused:
            self._unused.difference_update(keys)

    def judge(self, key: int, is_used: bool) -> None:
        """The call of its layer came after its read was begun."""
        now = self._clock()
        begun, ended = self._begun.pop(key, None), self._ended.pop(key, None)
        if begun is None:
            return
        if is_used:
            self._saved = self._saved * KEEP + (ended or now) - begun
            self._num_used = self._num_used * KEEP + 1
        else:
            self._cost *= KEEP
            self._num_useless = self._num_useless * KEEP + 1
            if ended is None:
                self._late[key] = now
            self._unused.add(key)

    def miss(self, key: int) -> None:
        """A call has to read an expert."""
        if (guest := self._left_for.pop(key, None)) is not None and guest in self._unused:
            self._cost += self._read_seconds

    def leave(self, key: int) -> None:
        """It is not in memory any more."""
        self._unused.discard(key)
        for times in (self._begun, self._ended, self._late):
            times.pop(key, None)
