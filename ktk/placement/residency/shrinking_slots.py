"""Slots that give memory back where the system runs short of it, and take it again later."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

from ktk.log import logger
from ktk.machine import cpu
from ktk.machine.memory import release_pages
from ktk.placement.residency.native_slots import NativeSlots
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.reader import ExpertReader
from ktk.placement.residency.states import ExpertState, SlotState
from ktk.placement.store import ExpertStore

# Shares of the memory that the cgroups or the machine allow: above the first experts leave, until
# no more than the second is in use; below the third they may come back. Source: MESH's guard.
FULL, EASED, FREE = 0.95, 0.90, 0.85
STALLED = 10.0  # per cent of ten seconds that something waited for memory
STEP = 8  # experts a look
PERIOD = 1.0  # seconds


class ShrinkingSlots(NativeSlots):
    """``NativeSlots`` whose room changes. With room for each layer of its own it stays."""

    _is_watched = False

    def __init__(
        self,
        stores: Sequence[ExpertStore],
        reader: ExpertReader,
        options: PoolOptions,
        top_k: int,
    ) -> None:
        super().__init__(stores, reader, options, top_k)
        # One token's, and those of any one layer, so that calls find the room they were told of.
        least = max(sum(min(top_k, count) for count in self._counts), *self._counts)
        is_fixed = options.is_per_layer or options.min_per_layer > 0
        self._least = self.capacity if is_fixed else min(least, self.capacity)
        self._away: list[int] = []  # slots whose memory the system has
        self._guard = threading.Event()  # set: it ends

    def shrink(self, many: int) -> int:
        """Give the memory of up to so many experts back to the system: empty slots, then of those
        that leave first and no call uses. Room for one token's and one layer's stays. Returns
        how many.
        """
        taken = 0
        with self._changed:
            many = min(many, self.capacity - self._least)
            while taken < many:
                if not self._free:
                    try:
                        self._leave_for_good()
                    except LookupError:
                        break
                slot = self._free.pop()
                release_pages(self._memory[slot])
                self._away.append(slot)
                self._pools.resize(-1)
                self.capacity -= 1
                taken += 1
            self._is_whole &= not taken
        return taken

    def grow(self, many: int) -> int:
        """Room for so many more again, at most what ``shrink`` took. Returns how many."""
        with self._changed:
            many = min(many, len(self._away))
            for _ in range(many):
                self._free.append(self._away.pop())
            self._pools.resize(many)
            self.capacity += many
            self._changed.notify_all()
        return many

    def _leave_for_good(self) -> None:
        """LookupError if all are in use."""
        key = self._pools.retire(lambda key: not self._is_idle(key))
        slot = self._slot_of.pop(key)
        self._step(key, ExpertState.DEMOTING)
        layer, expert = divmod(key, self.num_experts)
        self._stores[layer].place(expert, None, is_unused=True)
        self._step(key, ExpertState.COLD)
        self._step_slot(slot, SlotState.EMPTY)
        self._foretold.discard(key)
        self._counters.evictions += 1
        self._free.append(slot)

    def ease(self, root: Path | str = "/") -> int:
        """Look at the system's memory once. Returns by how many experts the room has changed."""
        total, available = cpu.memory(root)
        if not total:
            return 0
        used, is_stalled = 1 - available / total, cpu.memory_stall(root) > STALLED
        is_easing = used > EASED and bool(self._away)  # it was full a moment ago
        if used > FULL or is_stalled or is_easing:
            return -self.shrink(STEP)
        return self.grow(STEP) if used < FREE else 0

    def watch(self) -> None:
        """``ease`` now and then, until ``close``."""
        self._is_watched = True
        arguments = self._guard, weakref.ref(self)
        name = "ktk-expert-memory"
        threading.Thread(target=_watch, args=arguments, name=name, daemon=True).start()
        weakref.finalize(self, self._guard.set)

    def _start_threads(self) -> None:
        super()._start_threads()
        if self._is_watched:
            self.watch()

    def close(self) -> None:
        self._guard.set()
        super().close()


def _watch(over: threading.Event, of: weakref.ref[ShrinkingSlots]) -> None:
    while not over.wait(PERIOD):
        slots = of()
        if slots is None:
            return
        before = slots.capacity
        if slots.ease():
            level = logger.warning if slots.capacity < before else logger.info
            level("memory is short: room for %d experts, before %d", slots.capacity, before)
        del slots
