"""Who is in which slot, in which state, and for how many calls: the books of ``Slots``, which has
the lock and the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ktk.errors import BackendError
from ktk.placement.residency.ahead import Ahead
from ktk.placement.residency.pools import PoolOptions, Pools
from ktk.placement.residency.report import Counters
from ktk.placement.residency.states import (
    EXPERT_STEPS,
    NATIVE_STANDING,
    SLOT_STEPS,
    ExpertState,
    SlotState,
)


class TooManyExperts(BackendError):
    """A call uses more experts of a layer than there is room for."""


class Claim(NamedTuple):
    """An expert that has a slot and has yet to be read into it, after the victim left."""

    key: int
    slot: int
    victim: int | None


class Residents:
    """counts : experts of each layer. options, top_k : as of ``Slots``. Not thread-safe.

    An expert's key is layer * num_experts + expert; num_experts the most that a layer has.
    """

    def __init__(self, counts: Sequence[int], options: PoolOptions, top_k: int) -> None:
        self._counts = tuple(counts)
        self.num_experts = max(counts)
        self._pools = Pools(options, len(counts), self.num_experts, top_k)
        self.capacity = self._pools.capacity
        self._slots = [SlotState.EMPTY] * self.capacity
        self._free = list(range(self.capacity))[::-1]
        num_keys = len(counts) * self.num_experts
        self._experts = [ExpertState.COLD] * num_keys
        self._is_ready = [False] * num_keys  # resident or pinned
        self._standing = bytearray(num_keys)  # as native calls know it
        self._offered: set[int] = set()  # resident; they leave when a native call needs room
        self._readers = [0] * num_keys  # calls that use each expert, or wait for it
        self._slot_of: dict[int, int] = {}
        self._idle = [0] * len(counts)  # of each layer: resident, not pinned, without readers
        self._in_flight = 0  # experts with a slot that are not read yet
        self._unplaced: set[int] = set()  # of these, without a place in the tables yet
        # Of these, that will not be read, and why; None: no call wanted them.
        self._lost: dict[int, BaseException | None] = {}
        self._foretold: set[int] = set()  # prefetched; their layer's next call has not come
        self._useless: list[int] = []  # that call came and did not use them
        self._num_calls = [0] * len(counts)  # of each layer
        self._ahead = Ahead()
        self._counters = Counters()
        # Nobody ever leaves, so that no policy needs to know.
        self._is_whole = self.capacity >= sum(counts) and all(
            self.room(layer) >= count for layer, count in enumerate(counts)
        )

    def room(self, layer: int) -> int:
        """The most experts of the layer that one call may use."""
        return self._pools.room(layer)

    def _key(self, layer: int, expert: int) -> int:
        if not 0 <= layer < len(self._counts):
            raise ValueError(f"layer={layer}: must be 0..{len(self._counts) - 1}")
        if not 0 <= expert < self._counts[layer]:
            raise ValueError(
                f"layer {layer}: expert={expert}: must be 0..{self._counts[layer] - 1}"
            )
        return layer * self.num_experts + expert

    def _keys(self, layer: int, experts: Iterable[int]) -> list[int]:
        own = sorted(set(experts))
        if own:
            self._key(layer, own[0])
            self._key(layer, own[-1])
        first = layer * self.num_experts
        return [first + expert for expert in own]

    def _has_room(self, layer: int, keys: list[int]) -> bool:
        if any(self._experts[key] is ExpertState.DEMOTING or key in self._lost for key in keys):
            return False
        cold = sum(self._experts[key] is ExpertState.COLD for key in keys)
        own_idle = sum(self._is_idle(key) or key in self._offered for key in keys)
        return cold <= self._pools.space(layer, self._idle) - own_idle

    def _claim(self, cold: list[int], wanted: set[int]) -> list[Claim]:
        """A slot for each, which is empty or of one that leaves for it. wanted : they stay."""
        claims = []
        for key in cold:
            victim = self._pools.admit(
                key, lambda other: other in wanted or not self._is_idle(other)
            )
            if victim is None and not self._free:
                victim = self._take_back()
            if victim is None:
                slot = self._free.pop()
            else:
                slot = self._slot_of.pop(victim)
                self._step(victim, ExpertState.DEMOTING)
                self._foretold.discard(victim)
                self._counters.evictions += 1
            self._slot_of[key] = slot
            self._step_slot(slot, SlotState.LOADING)
            self._step(key, ExpertState.PREFETCHING)
            claims.append(Claim(key, slot, victim))
            self._unplaced.add(key)
        self._in_flight += len(claims)
        return claims

    def _take_back(self) -> int | None:
        """Where there is room, but no slot is free: who was offered and leaves now; None: a slot is
        free now.
        """
        raise AssertionError("there is room without a slot")

    def _keep(self, keys: Iterable[int]) -> None:
        """A call uses them: who is offered is so no more."""

    def _arrived(self, key: int, num_bytes: int) -> None:
        """Its slot has its bytes."""
        self._step_slot(self._slot_of[key], SlotState.READY)
        self._step(key, ExpertState.RESIDENT)
        self._counters.reads += 1
        self._counters.read_bytes += num_bytes
        self._in_flight -= 1

    def _dropped(self, key: int) -> None:
        """A lost expert's slot is empty, and it is cold."""
        self._pools.discard(key)
        slot = self._slot_of.pop(key)
        self._step_slot(slot, SlotState.EMPTY)
        self._free.append(slot)
        self._step(key, ExpertState.COLD)
        self._foretold.discard(key)
        del self._lost[key]
        self._in_flight -= 1

    def _count(self, layer: int, keys: list[int], num_cold: int, num_coming: int) -> None:
        """A call of the layer came."""
        counters = self._counters
        counters.cold += num_cold
        counters.in_flight += num_coming
        counters.hits += len(keys) - num_cold - num_coming
        self._num_calls[layer] += 1
        self._ahead.call()
        if self._foretold:
            own = {key for key in self._foretold if key // self.num_experts == layer}
            used = own.intersection(keys)
            counters.prefetch_hits += len(used)
            self._ahead.judge(len(used), 0)
            self._foretold -= own
            self._useless += own - used

    def _num_ahead(self) -> int:
        """Prefetched experts that are not read yet."""
        return sum(self._experts[key] is ExpertState.PREFETCHING for key in self._foretold)

    def _is_idle(self, key: int) -> bool:
        is_unused = self._experts[key] is ExpertState.RESIDENT and not self._readers[key]
        return is_unused and key not in self._offered

    def _is_on_its_way(self, key: int) -> bool:
        return self._experts[key] is ExpertState.PREFETCHING and key not in self._lost

    def _add_readers(self, keys: list[int], change: int) -> None:
        """change : 1 or -1."""
        for key in keys:
            many = self._readers[key]
            self._readers[key] = many + change
            turns = not many or not many + change  # it was or becomes unused
            is_here = self._experts[key] is ExpertState.RESIDENT and key not in self._offered
            if turns and is_here:
                self._idle[key // self.num_experts] -= change

    def _step(self, key: int, state: ExpertState) -> None:
        assert state in EXPERT_STEPS[self._experts[key]], (self._experts[key], state)
        before = self._is_idle(key)
        self._experts[key] = state
        self._standing[key] = NATIVE_STANDING[state]
        self._is_ready[key] = state in (ExpertState.RESIDENT, ExpertState.PINNED)
        self._idle[key // self.num_experts] += self._is_idle(key) - before

    def _step_slot(self, slot: int, state: SlotState) -> None:
        assert state in SLOT_STEPS[self._slots[slot]], (self._slots[slot], state)
        self._slots[slot] = state
