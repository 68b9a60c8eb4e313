"""Experts that are elsewhere: stores whose experts move, go and come,
and layers that hold some of theirs.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ktk.bench.blocks import random_matrix
from ktk.errors import BackendError
from ktk.experts.dequantise import expert_weights
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.placement.store import ExpertStore
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing

EXPERTS, TOKENS, HIDDEN, INNER = 8, 12, 96, 288
compiled = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")


def packed(name: str) -> StoredExperts:
    spec = MoESpec(EXPERTS, HIDDEN, INNER, name, has_bias=True)
    return pack_all(spec, random_experts(spec, 1))


def blocks() -> StoredExperts:
    sizes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    made = {name: random_matrix("Q8_0", EXPERTS, *size, 4) for name, size in sizes.items()}
    spec = MoESpec(EXPERTS, HIDDEN, INNER, "gguf", activation_group=64)
    return StoredExperts(spec, **made)


CASES = {"int4": lambda: packed("int4"), "bf16": lambda: packed("bf16"), "Q8_0": blocks}


def routed(seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (random_hidden(TOKENS, HIDDEN, 2), *random_routing(TOKENS, 2, EXPERTS, seed))


@pytest.fixture(params=CASES)
def experts(request: pytest.FixtureRequest) -> StoredExperts:
    return CASES[request.param]()


@compiled
def test_a_store_gives_the_bits_of_experts_in_one_place(experts: StoredExperts) -> None:
    store = ExpertStore(experts)
    moe, want = MoE(store), MoE(experts)(*routed())
    assert_exact(want, moe(*routed()))
    for e in range(EXPERTS):
        before = store.address(e)
        store.place(e, store.copy_of(e))
        assert store.address(e) != before
    assert_exact(want, moe(*routed()))
    assert_exact(
        MoE(experts).linear("gate_up", routed()[0], np.arange(TOKENS) % EXPERTS),
        moe.linear("gate_up", routed()[0], np.arange(TOKENS) % EXPERTS),
    )


def test_an_expert_alone_is_where_it_lies_now(experts: StoredExperts) -> None:
    store = ExpertStore(experts)
    want = [expert_weights(experts, e) for e in range(EXPERTS)]
    for e in range(EXPERTS):
        store.place(e, store.copy_of(e) if e else None)
    for e in range(1, EXPERTS):
        alone = store.alone(e)
        assert alone.num_stored == 1
        for name, value in want[e]._asdict().items():
            got = getattr(expert_weights(alone, e), name)
            assert (got is None) == (value is None)
            if value is not None:
                np.testing.assert_array_equal(got, value)
    assert store.alone(1).place_or_none(2) is None


@compiled
def test_absent_experts_are_named_or_fetched_once(experts: StoredExperts) -> None:
    whole = ExpertStore(experts)
    x, ids, weights = routed()
    want = MoE(experts)(x, ids, weights)
    for e in (2, 5):
        whole.place(e, None)
    assert whole.address(2) is None
    assert whole.present.sum() == EXPERTS - 2
    moe = MoE(whole)
    with pytest.raises(BackendError, match="experts 2, 5 are not in memory"):
        moe(x, np.full_like(ids, [2, 5]), weights)
    skip = np.isin(np.arange(EXPERTS), (2, 5))
    assert_exact(MoE(experts)(x, ids, weights, skip=skip), moe(x, ids, weights, skip=skip))
    fetched: list[int] = []

    def fetch(expert: int) -> np.ndarray:
        fetched.append(expert)
        return whole.copy_of(expert)

    whole.fetch = fetch
    for _ in range(3):
        assert_exact(want, moe(x, ids, weights))
    assert fetched == [e for e in (2, 5) if e in ids]


@compiled
def test_a_store_without_experts_is_filled_one_by_one() -> None:
    whole = packed("int4")
    full, store = ExpertStore(whole), ExpertStore.absent(whole.spec)
    assert not store.present.any()
    moe = MoE(store)
    with pytest.raises(BackendError, match="not in memory"):
        moe(*routed())
    for e in range(EXPERTS):
        store.place(e, full.copy_of(e))
    assert_exact(MoE(whole)(*routed()), moe(*routed()))


@compiled
def test_experts_that_move_go_and_come_under_threads_keep_the_bits(experts: StoredExperts) -> None:
    """The memory an expert leaves is written over at once: no call may read it any more."""
    store = ExpertStore(experts)
    store.fetch = store.copy_of
    moe = MoE(store, num_threads=2)
    cases = [routed(seed) for seed in range(4)]
    wanted = [MoE(experts, num_threads=2)(*case) for case in cases]
    spans: dict[int, np.ndarray] = {}
    stop, moves, wrong = threading.Event(), [0], []

    def leave(expert: int, to: np.ndarray | None) -> None:
        store.place(expert, to)
        if expert in spans:
            spans.pop(expert)[:] = 255
        if to is not None:
            spans[expert] = to
        moves[0] += 1

    def move() -> None:
        rng = np.random.default_rng(0)
        while not stop.is_set():
            expert = int(rng.integers(EXPERTS))
            leave(expert, store.copy_of(expert) if rng.random() < 0.6 else None)

    def call(case: int) -> None:
        while not stop.is_set():
            if not np.array_equal(moe(*cases[case]), wanted[case]):
                wrong.append(case)

    mover = threading.Thread(target=move)
    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in (mover, *callers):
        thread.start()
    end = time.monotonic() + 60
    while moves[0] < 200 and time.monotonic() < end:
        time.sleep(0.01)
    stop.set()
    for thread in (mover, *callers):
        thread.join()
    assert not wrong
    assert moves[0] >= 200


@compiled
def test_place_waits_for_a_call_that_uses_the_expert() -> None:
    store = ExpertStore(packed("int4"))
    done = threading.Event()

    def drop() -> None:
        store.place(3, None)
        done.set()

    with store.pinned(np.array([[3, 4]]), None):
        thread = threading.Thread(target=drop)
        thread.start()
        store.place(0, None)  # nobody uses it
        time.sleep(0.05)
        assert not done.is_set()
    thread.join(10)
    assert done.is_set()
    assert store.address(3) is None


def test_spans_that_do_not_fit_are_refused() -> None:
    store = ExpertStore(packed("int8"))
    good = store.copy_of(0)
    for span in (
        good[:-64],
        good.astype(np.uint16),
        aligned_buffer(good.size + 64)[1:][: good.size],
    ):
        with pytest.raises(ValueError, match="span"):
            store.place(0, span)
    store.place(0, good)


@pytest.mark.parametrize("method", ["auto", "NUMPY"])
def test_a_rank_holds_its_own_experts(method: str) -> None:
    """Half of the spans, the others -1: the same bits as the whole layer with the others
    skipped.
    """
    whole = packed("int8")
    mine = np.array([1, 4, 6])
    order = np.full(EXPERTS, -1)
    order[mine] = np.arange(3)
    spans = aligned_buffer(3 * whole.data.shape[1]).reshape(3, -1)
    spans[:] = whole.data[mine]
    own = MoE(StoredExperts.of_panels(whole.spec, spans, order), method=method)
    x, ids, weights = routed()
    skip = order < 0
    assert_exact(
        MoE(whole, method=method)(x, ids, weights, skip=skip), own(x, ids, weights, skip=skip)
    )
    assert own.packed.num_stored == 3
    with pytest.raises(BackendError, match="experts .* not in memory"):
        own(x, ids, weights)


def test_a_store_needs_kernels_that_take_it() -> None:
    with pytest.raises(BackendError, match="ExpertStore"):
        MoE(ExpertStore(packed("int8")), method="NUMPY")
