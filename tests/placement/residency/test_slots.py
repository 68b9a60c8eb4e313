"""Slots: states, readers, failures; a model of them by hypothesis; threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ktk.errors import BackendError, CheckpointError
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.reader import ExpertReader
from ktk.placement.residency.slots import Slots
from ktk.placement.residency.states import ExpertState, SlotState
from ktk.placement.store import ExpertStore

LAYERS, EXPERTS, TOP_K = 3, 6, 2
SPEC = MoESpec(EXPERTS, 64, 64, "int8")
HERE = (ExpertState.RESIDENT, ExpertState.PINNED)


def new_stores() -> list[ExpertStore]:
    size = SPEC.layout.expert_bytes
    spans = aligned_buffer(EXPERTS * size).reshape(EXPERTS, size)
    return [ExpertStore(StoredExperts.of_panels(SPEC, spans)) for _ in range(LAYERS)]


class Marks(ExpertReader):
    """An expert's bytes are its number. ``failing`` : keys whose next read fails; ``held`` : reads
    wait while it is clear.
    """

    def __init__(self) -> None:
        self.failing: set[int] = set()
        self.held = threading.Event()
        self.held.set()
        self.reads: list[int] = []
        self.is_closed = False

    def read(self, layer: int, expert: int, span: np.ndarray) -> None:
        key = layer * EXPERTS + expert
        assert span.ctypes.data % 4096 == 0
        span[:] = 255  # what a read that fails leaves
        self.held.wait(20)
        self.reads.append(key)
        if key in self.failing:
            self.failing.discard(key)
            raise CheckpointError(f"expert {expert}: made to fail")
        span[:] = key

    def close(self) -> None:
        self.is_closed = True


def make(capacity: int = 7, policy: str = "lru", **options: Any) -> tuple[Slots, Marks]:
    reader = Marks()
    return Slots(new_stores(), reader, PoolOptions(capacity, policy, **options), TOP_K), reader


@contextmanager
def slots_of(capacity: int = 7, policy: str = "lru", **options: Any) -> Iterator[Any]:
    slots, reader = make(capacity, policy, **options)
    try:
        yield slots, reader
    finally:
        reader.held.set()
        slots.close()
        assert reader.is_closed


def check(slots: Slots) -> None:
    """What must hold whenever no step is under way."""
    with slots._changed:
        used = dict(slots._slot_of)
        assert len(set(used.values())) == len(used)
        assert sorted([*used.values(), *slots._free]) == list(range(slots.capacity))
        for key, state in enumerate(slots._experts):
            layer, expert = divmod(key, EXPERTS)
            address = slots._stores[layer].address(expert)
            assert (key in used) == (state in (*HERE, ExpertState.PREFETCHING))
            assert (key in slots._pools) == (key in used)
            assert slots._readers[key] >= 0
            assert slots._is_ready[key] == (state in HERE)
            if state in HERE:
                span = slots._memory[used[key], : SPEC.layout.expert_bytes]
                assert slots._slots[used[key]] is SlotState.READY
                assert address == span.ctypes.data
                assert (span == key).all()
            if state is ExpertState.COLD:
                assert address is None
        for slot in slots._free:
            assert slots._slots[slot] is SlotState.EMPTY
        for layer in range(LAYERS):
            keys = range(layer * EXPERTS, (layer + 1) * EXPERTS)
            assert slots._idle[layer] == sum(slots._is_idle(key) for key in keys)
        counters = slots._counters
        assert counters.uses == counters.hits + counters.cold + counters.in_flight
        assert counters.read_bytes == counters.reads * SPEC.layout.expert_bytes
        assert counters.evictions <= counters.reads + counters.failures + counters.cancelled


class Residency(RuleBasedStateMachine):
    """Calls that begin and end in any order, prefetches, pins and failing reads, in one thread.

    ``open`` : each open call's layer and experts, which must stay until it ends.
    """

    @initialize(
        policy=st.sampled_from(["lru", "2q", "slru", "sieve", "s3fifo", "w_tinylfu", "heat"]),
        capacity=st.integers(LAYERS * TOP_K, 12),
        kind=st.sampled_from(["one pool", "minimum", "per layer"]),
    )
    def start(self, policy: str, capacity: int, kind: str) -> None:
        options = {"minimum": {"min_per_layer": 1}, "per layer": {"is_per_layer": True}}
        self.slots, self.reader = make(capacity, policy, **options.get(kind, {}))
        self.open: list[tuple[ExitStack, int, list[int]]] = []
        self.uses = 0

    layers = st.integers(0, LAYERS - 1)
    experts = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True)

    @rule(layer=layers, experts=experts, fails=st.booleans())
    def begin(self, layer: int, experts: list[int], fails: bool) -> None:
        self.settle()
        if len(experts) > self.slots.room(layer):
            with pytest.raises(BackendError, match="in waves"), self.slots.using(layer, experts):
                raise AssertionError
            return
        if not self.slots.fits(layer, experts):
            return  # it would wait for a call that this thread has open
        cold = [e for e in experts if self.slots.state(layer, e) is ExpertState.COLD]
        self.uses += len(experts)
        stack = ExitStack()
        if fails and cold:
            self.reader.failing = {layer * EXPERTS + cold[0]}
            with pytest.raises(CheckpointError, match="made to fail"):
                stack.enter_context(self.slots.using(layer, experts))
            assert self.slots.state(layer, cold[0]) is ExpertState.COLD
            return
        stack.enter_context(self.slots.using(layer, experts))
        self.open.append((stack, layer, experts))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.open) - 1))
        self.open.pop(index)[0].close()

    @rule(layer=layers, experts=experts, fails=st.booleans())
    def prefetch(self, layer: int, experts: list[int], fails: bool) -> None:
        cold = [e for e in experts if self.slots.state(layer, e) is ExpertState.COLD]
        if fails and cold:
            self.reader.failing = {layer * EXPERTS + cold[0]}
        self.slots.prefetch(layer, experts)
        self.settle()
        self.reader.failing.clear()

    @rule(layer=layers, expert=st.integers(0, EXPERTS - 1))
    def pin(self, layer: int, expert: int) -> None:
        self.settle()
        pinned = sum(state is ExpertState.PINNED for state in self.slots._experts)
        if pinned < 2 and self.slots.fits(layer, [expert]):
            self.slots.pin(layer, [expert])
            self.uses += 1
            assert self.slots.state(layer, expert) is ExpertState.PINNED

    @rule(layer=layers)
    def unpin(self, layer: int) -> None:
        self.slots.unpin(layer, range(EXPERTS))

    def settle(self) -> None:
        """Prefetches end."""
        end = time.monotonic() + 20
        while self.slots._in_flight and time.monotonic() < end:
            time.sleep(0.0005)
        assert not self.slots._in_flight

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "slots"):
            return
        self.settle()
        check(self.slots)
        for _, layer, experts in self.open:
            assert all(self.slots.state(layer, e) in HERE for e in experts)
        assert self.slots.counters().uses == self.uses

    def teardown(self) -> None:
        if hasattr(self, "slots"):
            for stack, _, _ in self.open:
                stack.close()
            self.slots.close()


def test_any_order_of_steps_keeps_the_invariants() -> None:
    run_state_machine_as_test(
        Residency, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def test_an_expert_that_is_used_does_not_leave() -> None:
    with slots_of(7) as (slots, _), slots.using(0, [0, 1, 2]):
        for e in range(EXPERTS):
            with slots.using(1, [e]):
                assert all(slots.state(0, own) is ExpertState.RESIDENT for own in (0, 1, 2))
        check(slots)


def test_a_call_waits_for_room_that_another_has() -> None:
    with slots_of(6) as (slots, _):
        began, ended = threading.Event(), threading.Event()

        def other() -> None:
            began.set()
            with slots.using(1, range(4)):
                ended.set()

        thread = threading.Thread(target=other)
        with slots.using(0, range(4)):
            assert not slots.fits(1, range(4))
            thread.start()
            began.wait(10)
            time.sleep(0.05)
            assert not ended.is_set()
        thread.join(10)
        assert ended.is_set()
        assert slots.counters().waits == 1


def test_two_calls_that_each_need_most_of_the_room_both_end() -> None:
    """Neither takes a part and waits for the rest."""
    with slots_of(6) as (slots, _):
        done = []

        def call(layer: int) -> None:
            for i in range(60):
                with slots.using(layer, [(i + j) % EXPERTS for j in range(5)]):
                    done.append(layer)

        threads = [threading.Thread(target=call, args=(layer,)) for layer in range(LAYERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(done) == sorted([0, 1, 2] * 60)
        check(slots)


def test_a_call_joins_a_read_that_is_under_way() -> None:
    with slots_of() as (slots, reader):
        reader.held.clear()
        assert slots.prefetch(0, [3]) == 1
        assert slots.state(0, 3) is ExpertState.PREFETCHING
        threading.Timer(0.05, reader.held.set).start()
        with slots.using(0, [3]):
            assert slots.state(0, 3) is ExpertState.RESIDENT
        found = slots.counters()
        assert (found.in_flight, found.cold, found.prefetch_hits) == (1, 0, 1)
        assert reader.reads == [3]


def test_a_call_reads_itself_what_a_prefetch_could_not() -> None:
    with slots_of() as (slots, reader):
        reader.held.clear()
        reader.failing = {3}
        slots.prefetch(0, [3])
        threading.Timer(0.05, reader.held.set).start()
        with slots.using(0, [3]):
            assert slots.state(0, 3) is ExpertState.RESIDENT
        assert reader.reads == [3, 3]
        found = slots.counters()
        assert (found.failures, found.reads, found.uses) == (1, 1, 1)
        check(slots)


def test_prefetches_stop_where_as_many_wait_as_run() -> None:
    with slots_of(12) as (slots, reader):
        reader.held.clear()
        assert slots.prefetch(0, range(EXPERTS)) == 4
        assert slots.prefetch(1, range(EXPERTS)) == 0
        reader.held.set()


def test_what_a_layers_next_call_does_not_use_is_not_read_ahead_any_more() -> None:
    with slots_of(12) as (slots, reader):
        reader.held.clear()
        assert slots.prefetch(0, [0, 1, 2, 3]) == 4  # two are being read, two wait
        held = slots.hold(0, [1, 2], reads_on=True)
        assert held is not None
        assert slots.state(0, 3) is ExpertState.COLD
        reader.held.set()
        slots.release(held)
        found = slots.counters()
        assert (found.prefetches, found.prefetch_hits, found.cancelled) == (4, 2, 1)
    assert sorted(reader.reads) == [0, 1, 2]


def test_what_is_foreseen_is_read_in_its_order_unless_the_layer_was_called_since() -> None:
    with slots_of(12) as (slots, reader):
        slots.foresee(1, [5, 2, 5, 4])
        end = time.monotonic() + 20
        while len(reader.reads) < 3 and time.monotonic() < end:
            time.sleep(0.0005)
        assert set(reader.reads[:3]) == {EXPERTS + 5, EXPERTS + 2, EXPERTS + 4}  # by threads
        with slots._changed:  # the thread that foresees waits
            slots.foresee(1, [0])
            with slots.using(1, [2]):
                pass
        slots._foreseer.shutdown()
        assert slots.state(1, 0) is ExpertState.COLD


def test_a_prefetch_pushes_nobody_out_that_it_foretells() -> None:
    with slots_of(6) as (slots, _):
        for layer, experts in ((0, [0, 1]), (1, [0, 1]), (2, [0, 1])):
            with slots.using(layer, experts):
                pass
        with slots.using(0, [0, 1]):
            assert slots.prefetch(1, [0, 1, 2, 3, 4]) == 2  # layer 2 has two to give, no more
        assert all(slots.state(1, e) is ExpertState.RESIDENT for e in (0, 1))


@pytest.mark.parametrize("options", [{}, {"is_per_layer": True}])
@pytest.mark.parametrize("capacity", [7, LAYERS * EXPERTS])
def test_fill_takes_the_empty_slots_and_gives_way_to_calls(
    capacity: int, options: dict[str, bool]
) -> None:
    with slots_of(capacity, **options) as (slots, reader):
        reader.held.clear()
        slots.fill()
        call = threading.Thread(target=lambda: slots.pin(2, [0]))  # the last that would be read
        call.start()
        time.sleep(0.05)
        reader.held.set()
        call.join(10)
        end = time.monotonic() + 20
        while slots._in_flight and time.monotonic() < end:
            time.sleep(0.0005)
        assert reader.reads.index(2 * EXPERTS) <= 2  # two were under way
        assert len(reader.reads) == capacity
        assert slots.report().resident == capacity
        found = [sum(slots.state(n, e) in HERE for e in range(EXPERTS)) for n in range(LAYERS)]
        assert max(found) - min(found) <= 1
        check(slots)
        assert slots.counters().evictions == 0


def test_fill_reads_no_expert_of_a_device() -> None:
    away = np.arange(EXPERTS) < 2
    with slots_of(LAYERS * EXPERTS) as (slots, reader):
        slots.fill([away, *[None] * (LAYERS - 1)])
        end = time.monotonic() + 20
        while slots._in_flight and time.monotonic() < end:
            time.sleep(0.0005)
        assert sorted(reader.reads) == list(range(2, LAYERS * EXPERTS))


def test_slots_are_closed_before_all_that_was_to_be_read_ahead() -> None:
    with slots_of(18) as (slots, reader):
        reader.held.clear()
        slots.fill()
        threading.Timer(0.05, reader.held.set).start()
    assert len(reader.reads) <= 2
    assert slots.counters().cancelled >= 16


def test_pinned_experts_stay_and_too_many_are_told() -> None:
    with slots_of(6) as (slots, _):
        slots.pin(0, [0, 1, 2])
        for e in range(EXPERTS):
            with slots.using(1, [e]):
                pass
        assert all(slots.state(0, e) is ExpertState.PINNED for e in (0, 1, 2))
        with (
            pytest.raises(BackendError, match="no room for 4 experts: 3 of 6 are pinned"),
            slots.using(2, range(4)),
        ):
            raise AssertionError
        slots.unpin(0, [0, 1, 2])
        with slots.using(2, range(4)):
            pass
        check(slots)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_read_rolls_back_and_the_next_call_works(failing: int) -> None:
    with slots_of() as (slots, reader):
        reader.failing = {failing}
        with pytest.raises(CheckpointError, match="made to fail"), slots.using(0, [0, 1, 2]):
            raise AssertionError
        check(slots)
        assert slots.state(0, failing) is ExpertState.COLD
        with slots.using(0, [0, 1, 2]):
            check(slots)
        assert slots.counters().failures == 1


def test_threads_with_failing_reads_see_only_whole_experts() -> None:
    """Each call looks at its experts' bytes while it has them."""
    with slots_of(8) as (slots, reader):
        stop, wrong, calls = time.monotonic() + 1.5, [], [0] * 4
        failed = [0] * 4

        def call(number: int) -> None:
            rng = np.random.default_rng(number)
            while time.monotonic() < stop:
                layer = int(rng.integers(LAYERS))
                experts = rng.choice(EXPERTS, rng.integers(1, 5), replace=False).tolist()
                if rng.random() < 0.2:
                    reader.failing.add(int(rng.integers(LAYERS * EXPERTS)))
                if rng.random() < 0.3:
                    slots.prefetch(int(rng.integers(LAYERS)), [int(rng.integers(EXPERTS))])
                try:
                    with slots.using(layer, experts):
                        for e in experts:
                            key = layer * EXPERTS + e
                            span = slots._memory[slots._slot_of[key]]
                            if (span[: SPEC.layout.expert_bytes] != key).any():
                                wrong.append(key)
                        calls[number] += 1
                except CheckpointError:
                    failed[number] += 1

        threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        end = time.monotonic() + 20
        while slots._in_flight and time.monotonic() < end:
            time.sleep(0.001)
        assert not wrong
        assert all(calls)
        assert sum(failed) > 0
        check(slots)


def test_what_is_not_there_is_refused() -> None:
    with slots_of() as (slots, _):
        for layer, expert in ((3, 0), (-1, 0), (0, 6), (0, -1)):
            with pytest.raises(ValueError, match=r"must be 0\.\."), slots.using(layer, [expert]):
                raise AssertionError
    with pytest.raises(ValueError, match="knows the future"):
        make(7, "belady")
    with pytest.raises(ValueError, match="must be at least 6"):
        make(5)
