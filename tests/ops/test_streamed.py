"""Experts that come and go while they run: the bits of all of them in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk.checkpoint.packed import read_layer, write_layer
from ktk.errors import AwaitedInVain, CheckpointError
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops import streamed
from ktk.ops.moe import MoE
from ktk.ops.streamed import StreamedMoE
from ktk.placement.residency.policies import POLICIES
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.reader import PackedReader
from ktk.placement.residency.slots import Slots
from ktk.placement.store import ExpertStore
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 2, 12, 96, 160, 3
FORMATS = ("nl4", "int4", "int8", "bf16")
ONLINE = [name for name, row in POLICIES.items() if not row.is_offline]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in FORMATS:
        spec = MoESpec(EXPERTS, HIDDEN, INNER, name, has_bias=True)
        made[name] = tmp_path_factory.mktemp(name)
        for layer in range(LAYERS):
            rows = np.asarray(pack_all(spec, random_experts(spec, layer)).spans)
            write_layer(made[name], spec, layer, rows)
    return made


@contextmanager
def opened(
    directory: Path, capacity: int, policy: str = "lru", num_threads: int | None = None, **kw: Any
) -> Iterator[tuple[list[StreamedMoE], Slots]]:
    """Every layer, and none of its experts."""
    layers = range(LAYERS)
    reader = PackedReader(directory, layers)
    stores = [ExpertStore.absent(spec) for spec in reader.specs]
    slots = Slots(stores, reader, PoolOptions(capacity, policy, **kw), TOP_K)
    moes = [MoE(store, num_threads=num_threads) for store in stores]
    try:
        yield [StreamedMoE(moe, slots, layer) for layer, moe in enumerate(moes)], slots
    finally:
        slots.close()


def resident(directory: Path) -> list[MoE]:
    return [MoE(read_layer(directory, layer)) for layer in range(LAYERS)]


def calls(num: int) -> list[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Layer by layer, one token each but for every fourth, which is a small batch."""
    made = []
    for i in range(num):
        tokens = 2 if i % 4 == 3 else 1
        routing = random_routing(tokens, TOP_K, EXPERTS, i)
        made.append((i % LAYERS, (random_hidden(tokens, HIDDEN, i), *routing)))
    return made


@pytest.mark.parametrize("policy", ONLINE)
def test_every_policy_gives_the_bits_of_all_in_memory(
    policy: str, directories: dict[str, Path]
) -> None:
    want = resident(directories["int4"])
    with opened(directories["int4"], 8, policy) as (layers, slots):
        for layer, call in calls(60):
            assert_exact(want[layer](*call), layers[layer](*call))
        found = slots.counters()
        assert found.hits > 0
        assert found.evictions > 0
        assert found.reads == found.cold


@pytest.mark.parametrize("capacity", [6, 7, 9, 24])
@pytest.mark.parametrize("name", FORMATS)
def test_every_capacity_from_one_tokens_experts_on(
    name: str, capacity: int, directories: dict[str, Path]
) -> None:
    want = resident(directories[name])
    with opened(directories[name], capacity, is_per_layer=capacity == 7) as (layers, slots):
        for layer, call in calls(30):
            assert_exact(want[layer](*call), layers[layer](*call))
        assert slots.counters().misses < slots.counters().uses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_waves_give_the_same_bits(
    name: str, dtype: torch.dtype, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 tokens use all 12 experts, room is for 3 of a layer; ids that are skipped, repeated or
    nobody's among them.
    """
    tokens = 40
    hidden = torch.from_numpy(random_hidden(tokens, HIDDEN, 5)).to(dtype)
    ids, weights = random_routing(tokens, TOP_K, EXPERTS, 6)
    assert len(np.unique(ids)) == EXPERTS
    ids[3], ids[4, 1], ids[5, 0] = 7, -1, EXPERTS
    weights[7] = 0
    skip = np.arange(EXPERTS) == 2
    add = random_hidden(tokens, HIDDEN, 8)
    want = resident(directories[name])[1]
    with opened(directories[name], 6, is_per_layer=True) as (layers, slots):
        for more in ({}, {"skip": skip}, {"skip": skip, "add": add}):
            expected = want(hidden, ids, weights, **more)
            assert expected.dtype == dtype
            before = slots.counters().reads
            assert torch.equal(expected, layers[1](hidden, ids, weights, **more))
            assert slots.counters().reads - before <= EXPERTS  # none is read twice
        monkeypatch.setattr(streamed, "WAVE_BYTES", 7 * 4 * TOP_K * HIDDEN)  # seven tokens
        assert torch.equal(expected, layers[1](hidden, ids, weights, **more))


def test_no_token_and_no_expert_give_zeros(directories: dict[str, Path]) -> None:
    with opened(directories["int8"], 6) as (layers, slots):
        none = np.empty((0, HIDDEN), np.float32), np.empty((0, 2), np.int64)
        assert layers[0](*none, np.empty((0, 2), np.float32)).shape == (0, HIDDEN)
        hidden = random_hidden(2, HIDDEN, 1)
        got = layers[0](hidden, np.full((2, 2), -1), np.ones((2, 2), np.float32))
        assert_exact(np.zeros_like(hidden), got)
        assert slots.counters().uses == 0


def test_threads_over_all_layers_give_the_bits(directories: dict[str, Path]) -> None:
    want = resident(directories["int4"])
    work = calls(120)
    expected = [want[layer](*call) for layer, call in work]
    wrong: list[int] = []
    with opened(directories["int4"], 9) as (layers, slots):

        def run(first: int) -> None:
            for i in range(first, len(work), 4):
                layer, call = work[i]
                if not np.array_equal(layers[layer](*call), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong
        assert slots.counters().evictions > 0


@contextmanager
def awaited(directory: Path, expert: int) -> Iterator[tuple[MoE, np.ndarray, ExpertStore]]:
    """A layer whose experts are all there except one, whose span is still to be filled."""
    reader = PackedReader(directory, [0])
    store = reader.store(0)
    moe, spans = MoE(store), aligned_buffer(EXPERTS * store.span_bytes)
    spans = spans.reshape(EXPERTS, store.span_bytes)
    for e in range(EXPERTS):
        if e != expert:
            reader.read(0, e, spans[e])
        store.place(e, spans[e], is_coming=e == expert)
    try:
        yield moe, spans[expert], store
    finally:
        reader.close()


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_operator_waits_for_an_expert_that_is_being_read(
    tokens: int, directories: dict[str, Path]
) -> None:
    call = (random_hidden(tokens, HIDDEN, 1), *random_routing(tokens, TOP_K, EXPERTS, 2))
    expert = int(call[1][0, 0])
    want = resident(directories["int4"])[0]
    expected, of_linear = want(*call), want.linear("gate_up", call[0], call[1][:, 0])
    got: list[np.ndarray] = []
    with awaited(directories["int4"], expert) as (moe, span, store):

        def run() -> None:
            got.append(moe(*call))
            got.append(moe.linear("gate_up", call[0], call[1][:, 0]))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(0.05)
        assert not got
        with closing(PackedReader(directories["int4"], [0])) as reader:
            reader.read(0, expert, span)
        store.arrive(expert)
        thread.join(20)
    assert_exact(expected, got[0])
    assert_exact(of_linear, got[1])


def test_an_expert_that_is_awaited_in_vain_ends_the_call(directories: dict[str, Path]) -> None:
    hidden, weights = random_hidden(2, HIDDEN, 1), np.ones((2, 1), np.float32)
    with awaited(directories["int8"], 5) as (moe, _, store):
        threading.Timer(0.02, store.arrive, (5,), {"is_lost": True}).start()
        with pytest.raises(AwaitedInVain):
            moe(hidden, np.array([[4], [5]]), weights)
        assert np.isfinite(moe(hidden, np.array([[4], [4]]), weights)).all()
        with pytest.raises(AwaitedInVain):
            moe.linear("down", np.ones((1, INNER), np.float32), np.array([5]))


@pytest.mark.parametrize("failures", [1, 2])
def test_a_read_that_fails_is_made_once_more_before_the_call_does(
    failures: int, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, call = calls(1)[0]
    want = resident(directories["int4"])[layer](*call)
    with opened(directories["int4"], 9) as (layers, slots):
        read, left, lost = slots.reader.read, [failures], int(call[1][0, 1])

        def failing(layer: int, expert: int, span: np.ndarray) -> None:
            if expert == lost and left[0]:
                left[0] -= 1
                raise CheckpointError("Input/output error")
            read(layer, expert, span)

        monkeypatch.setattr(slots.reader, "read", failing)
        if failures == 1:
            assert_exact(want, layers[layer](*call))
        else:
            with pytest.raises(CheckpointError, match="Input/output"):
                layers[layer](*call)
        assert_exact(want, layers[layer](*call))
        assert slots.counters().failures == failures
