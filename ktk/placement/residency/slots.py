"""Slots: memory for some of a model's experts, and which expert is in each now.

A call says which experts it uses; those on the disk are read into slots, and none leaves before the
call ends. A slot is any expert's, of any layer.

An expert has its place in the layer's tables before its read begins, and the threads that read wait
for no call: an operator that waits for them (``ktk_await``) can be sure that they come to an end.
What could not be read gives its place up once no call uses it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from ktk import fork
from ktk.errors import BackendError
from ktk.experts.layout import EXPERT_ALIGN, round_up
from ktk.machine.memory import aligned_buffer
from ktk.placement.residency.policies import find_policy
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.reader import ExpertReader
from ktk.placement.residency.reads import Reads
from ktk.placement.residency.report import Counters, ResidencyReport
from ktk.placement.residency.residents import Claim, Residents, TooManyExperts
from ktk.placement.residency.states import ExpertState
from ktk.placement.store import ExpertStore


class Slots(Residents):
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

    wants_scores : whether the policy looks at a router's scores. arrivals : what native calls bring
        experts with, None: they ask Python.
    """

    arrivals: Any = None

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
        self._policy_name, self.wants_scores = policy.name, policy.wants_scores
        self._stores, self.reader = list(stores), reader
        super().__init__([store.spec.num_experts for store in stores], options, top_k)
        self.slot_bytes = round_up(max(store.span_bytes for store in stores), EXPERT_ALIGN)
        memory = aligned_buffer(self.capacity * self.slot_bytes)
        self._memory = memory.reshape(self.capacity, self.slot_bytes)
        self._changed = threading.Condition()
        self._num_readers = num_readers
        self._is_paused = False  # no call begins
        self._is_foreseeing: bool = False
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

    def store(self, layer: int) -> ExpertStore:
        """A layer's."""
        return self._stores[layer]

    def state(self, layer: int, expert: int) -> ExpertState:
        with self._changed:
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
        reads_on: bool = False,
    ) -> list[int] | None:
        """``using`` that ends with ``release`` of what this returns.

        waits : for the end of other calls where those have all the room; else None is returned, and
        nothing is held. reads_on : do not wait for experts that are being read; the layer's
        operator does, and one that cannot be read ends it with AwaitedInVain. Raises as ``using``.
        """
        keys = self._keys(layer, experts)
        if len(keys) > self.room(layer):
            raise TooManyExperts(
                f"layer {layer}: a call uses {len(keys)} experts, {self.room(layer)} fit: make it "
                "in waves"
            )
        is_first = True
        while not (is_held := self._acquire(layer, keys, scores, is_first, waits, reads_on)):
            if is_held is None:
                return None
            is_first = False  # a read of another, on which it waited, has failed: read it again
        self._forget_useless()
        return keys

    def release(self, held: list[int]) -> None:
        """A call that ``hold`` brought experts for has ended."""
        with self._changed:
            self._add_readers(held, -1)
            lost = [key for key in held if self._is_to_drop(key)] if self._lost else ()
            self._changed.notify_all()
        for key in lost:
            self._drop(key)

    def prefetch(self, layer: int, experts: Iterable[int], most: int | None = None) -> int:
        """Begins to read those that are cold, in the order of the file, while there is room that
        nobody uses and fewer than ``most`` wait, by default as many as run at a time.

        They are read while no call waits for a read. Returns how many. Failures are counted, and
        left to the call that needs the expert.
        """
        return self._prefetch(self._keys(layer, experts), most)

    def foresee(self, layer: int, experts: list[int]) -> None:
        """``prefetch`` in this order by a thread of its own, if it is free and comes before the
        layer's next call.
        """
        if self._is_foreseeing:
            return
        self._is_foreseeing = True
        first, number = layer * self.num_experts, self._num_calls[layer]

        def run() -> None:
            try:
                if self._num_calls[layer] == number:
                    self._prefetch([first + expert for expert in dict.fromkeys(experts)], None)
            finally:
                self._is_foreseeing = False

        self._foreseer.submit(run)

    def _prefetch(self, keys: list[int], most: int | None) -> int:
        claims: list[Claim] = []
        most = self._num_readers if most is None else most
        if not keys:
            return 0
        layer = keys[0] // self.num_experts
        with self._changed:
            if self._is_paused:
                return 0
            wanted, ahead = set(keys), self._num_ahead()
            here = [key for key in keys if self._is_ready[key]]  # foretold, too: they stay
            self._keep(here)
            for key in keys:
                if ahead + len(claims) >= most:
                    break
                if self._experts[key] is ExpertState.COLD and self._has_room(layer, [key, *here]):
                    claims += self._claim([key], wanted)
                    self._foretold.add(key)
            self._counters.prefetches += len(claims)
        self._begin(claims, is_wanted=False)
        return len(claims)

    def fill(self, elsewhere: Sequence[np.ndarray | None] | None = None) -> None:
        """Begins to read experts into the slots that are empty, of each layer as many, in the order
        of the file. A call's reads go before.

        elsewhere : of each layer bool (num_experts,), experts that nobody will ask for, or None.
        Where all fit, none is read twice; and memory is slow when it is first written to.
        """
        claims: list[Claim] = []
        with self._changed:
            for number in range(self.num_experts):
                for layer, count in enumerate(self._counts):
                    away = None if elsewhere is None else elsewhere[layer]
                    if number >= count or (away is not None and away[number]):
                        continue
                    key = layer * self.num_experts + number
                    is_cold = self._experts[key] is ExpertState.COLD
                    if is_cold and self._free and self._pools.has_empty(layer):
                        claims += self._claim([key], {key})
        self._begin(sorted(claims), is_wanted=False)

    @property
    def looks_ahead(self) -> bool:
        """Whether ``prefetch`` has paid lately; after some calls without it is tried again."""
        return self._ahead.is_on and not self._is_whole

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
        self._foreseer.shutdown()
        self._cancel_all()
        self._reads.shutdown()
        for key in list(self._slot_of):
            layer, expert = divmod(key, self.num_experts)
            self._stores[layer].place(expert, None)
        self.reader.close()

    def pause(self) -> None:
        """Until ``resume`` no call begins; returns once all have ended and no read runs."""
        self._changed.acquire()
        self._is_paused = True
        self._cancel_all()
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
        self._reads = Reads(self._num_readers)
        self._foreseer = ThreadPoolExecutor(1, thread_name_prefix="ktk-expert-foresight")
        self._is_foreseeing = False

    # --- a call's way ---

    def _acquire(
        self,
        layer: int,
        keys: list[int],
        scores: np.ndarray | None,
        is_first: bool,
        waits: bool,
        reads_on: bool,
    ) -> bool | None:
        """Readers of all keys, which are resident then, or with reads_on on their way; False,
        without readers, if one that another call or a prefetch was reading could not be read; None
        if it would have to wait for room.
        """
        wanted = set(keys)
        with self._changed:
            if self._is_paused:
                self._changed.wait_for(lambda: not self._is_paused)
            self._keep(keys)
            if is_first and all(map(self._is_ready.__getitem__, keys)):  # mostly so: be quick
                self._count(layer, keys, 0, 0)
                if not self._is_whole:
                    self._pools.begin(layer, keys, scores)
                    self._pools.hit_all(layer, keys)
                self._add_readers(keys, 1)
                return True
            if not waits and not self._has_room(layer, keys):
                return None
            self._wait_for_room(layer, keys)
            self._keep(keys)
            cold = [key for key in keys if self._experts[key] is ExpertState.COLD]
            coming = [key for key in keys if self._experts[key] is ExpertState.PREFETCHING]
            if is_first:
                self._count(layer, keys, len(cold), len(coming))
                self._pools.begin(layer, keys, scores)
            here = [key for key in keys if self._experts[key] is not ExpertState.COLD]
            self._pools.hit_all(layer, here)
            claims = self._claim(cold, wanted)
            self._add_readers(keys, 1)
        for key in coming:
            self._hurry(key)
        self._begin(claims, is_wanted=True)
        with self._changed:
            if reads_on:
                self._changed.wait_for(lambda: self._unplaced.isdisjoint(keys))
                return True
            self._changed.wait_for(lambda: not any(map(self._is_on_its_way, (*cold, *coming))))
            failed = [key for key in (*cold, *coming) if key in self._lost]
            error = next((self._lost[key] for key in failed if key in cold), None)
        if not failed:
            return True
        self.release(keys)
        with self._changed:
            self._changed.wait_for(lambda: self._lost.keys().isdisjoint(failed))
        if error is not None:
            raise error
        return False

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

    def _begin(self, claims: list[Claim], is_wanted: bool) -> None:
        """Without the lock: victims leave, which no call uses; reads are handed out."""
        for claim in claims:
            layer, expert = divmod(claim.key, self.num_experts)
            if claim.victim is not None:
                self._leave(claim.victim)
            span = self._memory[claim.slot, : self._stores[layer].span_bytes]
            self._stores[layer].place(expert, span, is_coming=True, is_unused=True)
            with self._changed:
                self._unplaced.discard(claim.key)
                self._changed.notify_all()
            read = functools.partial(self._load, claim.key, span)
            if is_wanted or self._readers[claim.key]:  # a call may have joined a prefetch
                self._reads.want(read)
            else:
                self._reads.foresee(claim.key, read)
                if self._readers[claim.key]:
                    self._reads.hurry(claim.key)

    def _load(self, key: int, span: np.ndarray) -> None:
        """By a thread that reads. It waits for no call, as one may wait for it."""
        layer, expert = divmod(key, self.num_experts)
        try:
            self.reader.read(layer, expert, span)
        except BaseException as error:
            self._stores[layer].arrive(expert, is_lost=True)
            self._lose(key, error)
            return
        self._stores[layer].arrive(expert)
        with self._changed:
            self._arrived(key, len(span))
            self._changed.notify_all()

    def _hurry(self, key: int) -> None:
        """A call waits for it now."""
        self._reads.hurry(key)

    def _forget_useless(self) -> None:
        if not self._useless:
            return
        with self._changed:
            useless, self._useless = self._useless, []
        for key in useless:
            self._forget(key)

    def _forget(self, key: int) -> None:
        """A prefetch that was of no use: it is not read any more, unless that has begun."""
        with self._changed:
            if self._readers[key]:
                return
            if not self._reads.cancel(key):
                self._ahead.judge(0, 1)
                return
            self._counters.cancelled += 1
            self._lost[key] = None
        self._drop(key)

    def _cancel_all(self) -> None:
        with self._changed:
            keys = self._reads.cancel_all()
            self._counters.cancelled += len(keys)
            self._lost.update(dict.fromkeys(keys))
        for key in keys:
            self._drop(key)

    def _lose(self, key: int, error: BaseException) -> None:
        with self._changed:
            self._lost[key] = error
            self._counters.failures += 1
            is_to_drop = self._is_to_drop(key)
            self._changed.notify_all()
        if is_to_drop:
            self._drop(key)

    def _is_to_drop(self, key: int) -> bool:
        """By who has just taken the last reader away, or lost what had none."""
        return key in self._lost and not self._readers[key]

    def _drop(self, key: int) -> None:
        """A lost expert gives its slot back. Nobody takes it meanwhile."""
        layer, expert = divmod(key, self.num_experts)
        self._stores[layer].place(expert, None, is_unused=True)
        with self._changed:
            self._dropped(key)
            self._changed.notify_all()

    def _leave(self, victim: int) -> None:
        layer, expert = divmod(victim, self.num_experts)
        try:
            self._stores[layer].place(expert, None, is_unused=True)
        finally:
            with self._changed:
                self._step(victim, ExpertState.COLD)
                self._changed.notify_all()


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
