"""Slots: memory for some of a model's experts, and which expert is in each now.

A call says which experts it uses; those on the disk are read into slots, and none leaves before the
call ends. A slot is any expert's, of any layer.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ktk import fork
from ktk.errors import BackendError
from ktk.experts.layout import EXPERT_ALIGN, round_up
from ktk.machine.memory import aligned_buffer
from ktk.placement.residency.policies import find_policy
from ktk.placement.residency.pools import PoolOptions, Pools
from ktk.placement.residency.reader import ExpertReader
from ktk.placement.residency.report import Counters, ResidencyReport
from ktk.placement.residency.states import EXPERT_STEPS, SLOT_STEPS, ExpertState, SlotState
from ktk.placement.store import ExpertStore


class TooManyExperts(BackendError):
    """A call uses more experts of a layer than there is room for."""


class _Claim(NamedTuple):
    """An expert that has a slot and has yet to be read into it, after the victim left."""

    key: int
    slot: int
    victim: int | None


class Slots:
    """The experts of some layers that are in memory. Safe to use from several threads.

    Parameters
    ----------
    stores : the layers' experts. None is in memory afterwards, except where the stores were made
        from; ``MoE(store)`` runs them within ``using``.
    reader : of the same layers.
    options : room and policy. ValueError if not even one token's experts fit, or if the policy must
        know the future.
    top_k : experts that one token uses in a layer.
    num_readers : reads at a time.
    """

    def __init__(
        self,
        stores: Sequence[ExpertStore],
        reader: ExpertReader,
        options: PoolOptions,
        top_k: int,
        num_readers: int = 4,
    ) -> None:
        policy = find_policy(options.policy)
        if policy.is_offline:
            raise ValueError(f"residency policy {options.policy}: knows the future, for replays")
        self._policy_name = policy.name
        self._stores, self.reader = list(stores), reader
        self.num_experts = max(store.spec.num_experts for store in stores)
        self._pools = Pools(options, len(stores), self.num_experts, top_k)
        self.capacity = self._pools.capacity
        self.slot_bytes = round_up(max(store.span_bytes for store in stores), EXPERT_ALIGN)
        memory = aligned_buffer(self.capacity * self.slot_bytes)
        self._memory = memory.reshape(self.capacity, self.slot_bytes)
        self._slots = [SlotState.EMPTY] * self.capacity
        self._free = list(range(self.capacity))[::-1]
        num_keys = len(stores) * self.num_experts
        self._experts = [ExpertState.COLD] * num_keys
        self._is_ready = [False] * num_keys  # resident or pinned
        self._readers = [0] * num_keys  # calls that use each expert, or wait for it
        self._slot_of: dict[int, int] = {}
        self._idle = [0] * len(stores)  # of each layer: resident, not pinned, without readers
        self._in_flight = 0  # experts with a slot that are not read yet
        self._foretold: set[int] = set()  # prefetched and not used yet
        self._counters = Counters()
        self._changed = threading.Condition()
        self._num_readers = num_readers
        self._is_paused = False  # no call begins
        self._start_threads()
        for store in stores:
            for expert in range(store.spec.num_experts):
                store.place(expert, None)
        _all.add(self)

    # --- what callers see ---

    @property
    def memory(self) -> np.ndarray:
        """uint8 (capacity, slot_bytes): all slots."""
        return self._memory

    def room(self, layer: int) -> int:
        """The most experts of the layer that one call may use."""
        return self._pools.room(layer)

    def counters(self) -> Counters:
        """A copy."""
        with self._changed:
            return dataclasses.replace(self._counters)

    def report(self) -> ResidencyReport:
        """How it stands now."""
        with self._changed:
            return ResidencyReport(
                self._policy_name,
                self.reader.is_direct,
                sum(store.spec.num_experts for store in self._stores),
                self.capacity,
                self.slot_bytes,
                sum(self._is_ready),
                dataclasses.replace(self._counters),
            )

    def state(self, layer: int, expert: int) -> ExpertState:
        return self._experts[self._key(layer, expert)]

    def fits(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether a call that uses these would not have to wait for others to end."""
        with self._changed:
            return self._has_room(layer, self._keys(layer, experts))

    @contextmanager
    def using(
        self, layer: int, experts: Iterable[int], scores: np.ndarray | None = None
    ) -> Iterator[None]:
        """The experts are in memory, and stay there, within.

        scores : the router's, float32 (num_experts,), for policies that look at them.
        Waits for other calls where those have all the room: a thread must not use it within
        itself. BackendError if there are more experts
        than ``room(layer)``, or what is pinned leaves no room; CheckpointError if one cannot be
        read: all then is as before, except who left.
        """
        held = self.hold(layer, experts, scores)
        assert held is not None
        try:
            yield
        finally:
            self.release(held)

    def hold(
        self,
        layer: int,
        experts: Iterable[int],
        scores: np.ndarray | None = None,
        waits: bool = True,
    ) -> list[int] | None:
        """``using`` that ends with ``release`` of what this returns.

        waits : for the end of other calls where those have all the room; else None is returned, and
        nothing is held. Raises as ``using``.
        """
        keys = self._keys(layer, experts)
        if len(keys) > self.room(layer):
            raise TooManyExperts(
                f"layer {layer}: a call uses {len(keys)} experts, {self.room(layer)} fit: make it "
                "in waves"
            )
        is_first = True
        while not (is_held := self._acquire(layer, keys, scores, is_first, waits)):
            if is_held is None:
                return None
            is_first = False  # a prefetch on which it waited has failed: read it again
        return keys

    def release(self, held: list[int]) -> None:
        """A call that ``hold`` brought experts for has ended."""
        with self._changed:
            self._add_readers(held, -1)
            self._changed.notify_all()

    def prefetch(self, layer: int, experts: Iterable[int]) -> int:
        """Begins to read those that are cold, while there is room that nobody uses and no more
        reads wait than run at a time.

        Returns how many. Failures are counted, and left to the call that needs the expert.
        """
        claims: list[_Claim] = []
        with self._changed:
            for key in () if self._is_paused else self._keys(layer, experts):
                if self._in_flight >= self._num_readers:
                    break
                if self._experts[key] is ExpertState.COLD and self._has_room(layer, [key]):
                    claims += self._claim([key], {key})
                    self._foretold.add(key)
            self._counters.prefetches += len(claims)
        for claim in claims:
            self._threads.submit(self._load, claim)
        return len(claims)

    def pin(self, layer: int, experts: Iterable[int]) -> None:
        """Read what is cold; from now on they stay. Raises as ``using``."""
        keys = self._keys(layer, experts)
        with self.using(layer, [key % self.num_experts for key in keys]), self._changed:
            for key in keys:
                if self._experts[key] is ExpertState.RESIDENT:
                    self._step(key, ExpertState.PINNED)

    def unpin(self, layer: int, experts: Iterable[int]) -> None:
        """Those that are pinned may leave again."""
        with self._changed:
            for key in self._keys(layer, experts):
                if self._experts[key] is ExpertState.PINNED:
                    self._step(key, ExpertState.RESIDENT)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends after the reads that run; the stores have no expert any more, and the reader is
        closed. Calls must have ended.
        """
        self._threads.shutdown()
        for key in list(self._slot_of):
            layer, expert = divmod(key, self.num_experts)
            self._stores[layer].place(expert, None)
        self.reader.close()

    def pause(self) -> None:
        """Until ``resume`` no call begins; returns once all have ended and no read runs."""
        self._changed.acquire()
        self._is_paused = True
        self._changed.wait_for(lambda: not self._in_flight and not any(self._readers))

    def resume(self) -> None:
        """By the thread that called ``pause``, in its process or in a child forked meanwhile."""
        if self._process != fork.process():
            self._start_threads()
        self._is_paused = False
        self._changed.notify_all()
        self._changed.release()

    def _start_threads(self) -> None:
        self._process = fork.process()
        self._threads = ThreadPoolExecutor(
            self._num_readers, thread_name_prefix="ktk-expert-reader"
        )

    # --- a call's way ---

    def _acquire(
        self,
        layer: int,
        keys: list[int],
        scores: np.ndarray | None,
        is_first: bool,
        waits: bool,
    ) -> bool | None:
        """Readers of all keys, which are resident then; False, without readers, if one that
        another call or a prefetch was reading could not be read; None if it would have to wait for
        room.
        """
        wanted = set(keys)
        with self._changed:
            if self._is_paused:
                self._changed.wait_for(lambda: not self._is_paused)
            if is_first and all(map(self._is_ready.__getitem__, keys)):  # mostly so: be quick
                self._count(keys, (), ())
                self._pools.begin(layer, keys, scores)
                self._pools.hit_all(layer, keys)
                self._add_readers(keys, 1)
                return True
            if not waits and not self._has_room(layer, keys):
                return None
            self._wait_for_room(layer, keys)
            cold = [key for key in keys if self._experts[key] is ExpertState.COLD]
            coming = [key for key in keys if self._experts[key] is ExpertState.PREFETCHING]
            if is_first:
                self._count(keys, cold, coming)
                self._pools.begin(layer, keys, scores)
            here = [key for key in keys if self._experts[key] is not ExpertState.COLD]
            self._pools.hit_all(layer, here)
            claims = self._claim(cold, wanted)
            self._add_readers(keys, 1)
        try:
            self._load_all(claims)
            with self._changed:
                self._changed.wait_for(
                    lambda: all(self._experts[key] is not ExpertState.PREFETCHING for key in coming)
                )
                if all(self._experts[key] is not ExpertState.COLD for key in coming):
                    return True
        except BaseException:
            self.release(keys)
            raise
        self.release(keys)
        return False

    def _count(self, keys: list[int], cold: Sequence[int], coming: Sequence[int]) -> None:
        counters = self._counters
        counters.cold += len(cold)
        counters.in_flight += len(coming)
        counters.hits += len(keys) - len(cold) - len(coming)
        if self._foretold:
            used = self._foretold.intersection(keys)
            counters.prefetch_hits += len(used)
            self._foretold -= used

    def _wait_for_room(self, layer: int, keys: list[int]) -> None:
        """Until the call can have all it needs at once: who waits holds nothing,
        so that no two calls wait for each other.
        """

        def is_ready() -> bool:
            return self._has_room(layer, keys) or not self._is_busy()

        if not self._has_room(layer, keys):
            self._counters.waits += 1
            self._changed.wait_for(is_ready)
        if not self._has_room(layer, keys):
            pinned = sum(state is ExpertState.PINNED for state in self._experts)
            raise BackendError(
                f"layer {layer}: no room for {len(keys)} experts: {pinned} of {self.capacity} are "
                "pinned; unpin some"
            )

    def _is_busy(self) -> bool:
        """Whether something will change by itself."""
        passing = (ExpertState.PREFETCHING, ExpertState.DEMOTING)
        return any(self._readers) or any(state in passing for state in self._experts)

    def _has_room(self, layer: int, keys: list[int]) -> bool:
        if any(self._experts[key] is ExpertState.DEMOTING for key in keys):
            return False
        cold = sum(self._experts[key] is ExpertState.COLD for key in keys)
        own_idle = sum(self._is_idle(key) for key in keys)
        return cold <= self._pools.space(layer, self._idle) - own_idle

    def _claim(self, cold: list[int], wanted: set[int]) -> list[_Claim]:
        """A slot for each, which is empty or of one that leaves for it."""
        claims = []
        for key in cold:
            victim = self._pools.admit(
                key, lambda other: other in wanted or not self._is_idle(other)
            )
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
            claims.append(_Claim(key, slot, victim))
        self._in_flight += len(claims)
        return claims

    def _load_all(self, claims: list[_Claim]) -> None:
        """All of them end; then the first failure is raised."""
        if len(claims) == 1:
            self._load(claims[0])
            return
        futures: list[Future[None]] = [self._threads.submit(self._load, c) for c in claims]
        wait(futures)
        for future in futures:
            future.result()

    def _load(self, claim: _Claim) -> None:
        """Without the lock: the victim's calls end, the disk is read. On failure the slot is empty
        and the expert cold.
        """
        layer, expert = divmod(claim.key, self.num_experts)
        store = self._stores[layer]
        try:
            if claim.victim is not None:
                self._leave(claim.victim)
            span = self._memory[claim.slot, : store.span_bytes]
            self.reader.read(layer, expert, span)
            store.place(expert, span)
        except BaseException:
            with self._changed:
                self._pools.discard(claim.key)
                del self._slot_of[claim.key]
                self._step_slot(claim.slot, SlotState.EMPTY)
                self._free.append(claim.slot)
                self._step(claim.key, ExpertState.COLD)
                self._foretold.discard(claim.key)
                self._counters.failures += 1
                self._in_flight -= 1
                self._changed.notify_all()
            raise
        with self._changed:
            self._step_slot(claim.slot, SlotState.READY)
            self._step(claim.key, ExpertState.RESIDENT)
            self._counters.reads += 1
            self._counters.read_bytes += store.span_bytes
            self._in_flight -= 1
            self._changed.notify_all()

    def _leave(self, victim: int) -> None:
        layer, expert = divmod(victim, self.num_experts)
        try:
            self._stores[layer].place(expert, None)  # waits until no call reads it
        finally:
            with self._changed:
                self._step(victim, ExpertState.COLD)
                self._changed.notify_all()

    # --- states, under the lock ---

    def _key(self, layer: int, expert: int) -> int:
        if not 0 <= layer < len(self._stores):
            raise ValueError(f"layer={layer}: must be 0..{len(self._stores) - 1}")
        if not 0 <= expert < self._stores[layer].spec.num_experts:
            many = self._stores[layer].spec.num_experts
            raise ValueError(f"layer {layer}: expert={expert}: must be 0..{many - 1}")
        return layer * self.num_experts + expert

    def _keys(self, layer: int, experts: Iterable[int]) -> list[int]:
        own = sorted(set(experts))
        if own:
            self._key(layer, own[0])
            self._key(layer, own[-1])
        first = layer * self.num_experts
        return [first + expert for expert in own]

    def _is_idle(self, key: int) -> bool:
        return self._experts[key] is ExpertState.RESIDENT and not self._readers[key]

    def _add_readers(self, keys: list[int], change: int) -> None:
        """change : 1 or -1."""
        for key in keys:
            many = self._readers[key]
            self._readers[key] = many + change
            turns = not many or not many + change  # it was or becomes unused
            if turns and self._experts[key] is ExpertState.RESIDENT:
                self._idle[key // self.num_experts] -= change

    def _step(self, key: int, state: ExpertState) -> None:
        assert state in EXPERT_STEPS[self._experts[key]], (self._experts[key], state)
        before = self._is_idle(key)
        self._experts[key] = state
        self._is_ready[key] = state in (ExpertState.RESIDENT, ExpertState.PINNED)
        self._idle[key // self.num_experts] += self._is_idle(key) - before

    def _step_slot(self, slot: int, state: SlotState) -> None:
        assert state in SLOT_STEPS[self._slots[slot]], (self._slots[slot], state)
        self._slots[slot] = state


# A child forked amid a read would have part of an expert; with O_DIRECT the rest of it might even
# come to the child alone. One forked amid a call would wait for its end.
_all: weakref.WeakSet[Slots] = weakref.WeakSet()
_paused: list[Slots] = []


def _pause_all() -> None:
    for slots in list(_all):
        slots.pause()
        _paused.append(slots)


def _resume_all() -> None:
    while _paused:
        _paused.pop().resume()


fork.around(_pause_all, _resume_all)
