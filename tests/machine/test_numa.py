"""Two NUMA nodes: the same bits, workers beside the weights they read.

`make test-numa` has such a machine.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import ktk
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu, numa
from ktk.machine import threads as engine
from ktk.machine.memory import HUGE_PAGE, aligned_buffer, node_of_pages
from ktk.reference.moe import ExactExperts
from make import TESTS
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing

# Nodes that have memory and two of this process's CPUs, the first two of them.
NODES = tuple(
    node.id
    for node in cpu.numa_nodes()
    if node.memory_bytes and len(set(node.cpus) & set(cpu.allowed_cpus())) >= 2
)[:2]
pytestmark = [
    pytest.mark.skipif(len(NODES) < 2, reason="this machine has not two NUMA nodes"),
    pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here"),
]

TOKENS, TOP_K, EXPERTS = 40, 3, 6
# 17 panels of channels and 13 of outputs: neither halves evenly.
HIDDEN, INTERMEDIATE = 208, 272
# Large enough for halves of whole huge pages: 12 MiB as int8.
LARGE = MoESpec(8, 512, 1024, "int8")


@pytest.fixture(autouse=True)
def _drop_what_failed_tests_hold() -> None:
    gc.collect()


@contextmanager
def layout_of(
    num_threads: int | None = None,
    threadpool_count: int | None = None,
    numa_nodes: tuple[int, ...] | None = None,
) -> Iterator[engine.EngineLayout]:
    """The process's layout for a block; MoE objects made inside take it and must end inside."""
    holder = engine.Holder()
    yield engine.acquire(holder, num_threads, threadpool_count, numa_nodes)
    del holder


@cache
def small(weight_format: str, has_bias: bool = False) -> tuple[StoredExperts, np.ndarray]:
    """Packed experts and the reference's output for ``inputs(TOKENS)``."""
    spec = MoESpec(EXPERTS, HIDDEN, INTERMEDIATE, weight_format, has_bias=has_bias)
    packed = pack_all(spec, random_experts(spec, 1))
    return packed, ExactExperts(packed).forward(*inputs(TOKENS))


@cache
def large() -> StoredExperts:
    """Random bytes: who looks only at where they lie needs no codes."""
    size = LARGE.layout.expert_bytes
    data = aligned_buffer(LARGE.num_experts * size).reshape(LARGE.num_experts, size)
    data[:] = np.random.default_rng(1).integers(0, 64, data.shape, np.uint8)
    return StoredExperts.of_panels(LARGE, data)


def inputs(num_tokens: int, hidden_size: int = HIDDEN) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first ``num_tokens`` of TOKENS: hidden, ids, weights."""
    ids, weights = random_routing(TOKENS, TOP_K, EXPERTS, 2)
    return (
        random_hidden(TOKENS, hidden_size, 3)[:num_tokens],
        ids[:num_tokens],
        weights[:num_tokens],
    )


def bound_ranges() -> list[tuple[int, int, int]]:
    """(node, address, bytes) of this process's memory with a NUMA policy,
    as the kernel tells it.
    """
    maps = Path("/proc/self/maps").read_text()
    ends = {int(a, 16): int(b, 16) for a, b in re.findall(r"^(\w+)-(\w+) ", maps, re.M)}
    policies = re.findall(
        r"^(\w+) (?:bind|prefer)[^:\n]*:(\d+)\b", Path("/proc/self/numa_maps").read_text(), re.M
    )
    starts = [(int(node), int(start, 16)) for start, node in policies]
    return [(node, start, ends[start] - start) for node, start in starts if start in ends]


def worker_cpus() -> list[set[int]]:
    """CPUs that each worker thread of this process may run on."""
    tasks = list(Path("/proc/self/task").iterdir())
    names = {int(t.name): (t / "comm").read_text().strip() for t in tasks}
    return [os.sched_getaffinity(thread) for thread, name in names.items() if name == "ktk-worker"]


def misplaced_workers(layout: engine.EngineLayout) -> str | None:
    """What is wrong with the workers' affinities, or None. Thread 0 is the caller."""
    parts = [i * layout.threadpool_count // layout.num_threads for i in range(layout.num_threads)]
    want = Counter(layout.numa_nodes[part] for part in parts[1:])
    found = worker_cpus()
    spread = [c for c in found if len({numa.node_of_cpu(i) for i in c}) > 1]
    if spread:
        return f"workers that may leave their node: {spread}"
    have = Counter(numa.node_of_cpu(next(iter(c))) for c in found)
    if have != want:
        return f"workers per node {dict(have)}, wanted {dict(want)}"
    for i, first in enumerate(found):
        if (
            any(first & second for second in found[:i])
            or cpu.num_physical_cores(allowed=sorted(first)) > 1
        ):
            return f"workers without a core of their own: {found}"
    return None


def misplaced_weights(layout: engine.EngineLayout, packed: StoredExperts) -> str | None:
    """What is wrong with where the only MoE's weights lie, or None."""
    held: Counter[int] = Counter()
    for node, address, num_bytes in bound_ranges():
        pages = numa.page_nodes(address, num_bytes)
        pages = pages[pages >= 0]
        if (pages != node).any():
            return f"{np.count_nonzero(pages != node)} of {len(pages)} pages are not on node {node}"
        held[node] += len(pages) * 4096
    share = Counter(layout.numa_nodes)
    if set(held) - set(share):
        return f"weights on nodes {set(held)}, the layout has {set(share)}"
    for node, parts in share.items():
        want = packed.data.nbytes * parts / layout.threadpool_count
        if not 0.9 * want <= held[node] <= 1.1 * want + HUGE_PAGE:
            return f"{held[node]} bytes on node {node}, wanted about {want:.0f}"
    return None


def assert_placed(layout: engine.EngineLayout, packed: StoredExperts) -> None:
    """Workers pinned as the layout says, soon (a thread pins itself after it started),
    and weights with them.
    """
    deadline = time.monotonic() + 10
    while misplaced_workers(layout) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert misplaced_workers(layout) is None
    assert misplaced_weights(layout, packed) is None


# -- the machine and the tools above
# -----------------------------------------------------------------


def test_binding_moves_pages_to_either_node_and_back() -> None:
    array = aligned_buffer(HUGE_PAGE)
    array[:] = 7
    for node in (*NODES, *NODES):
        numa.bind(array.ctypes.data, array.nbytes, node)
        assert set(node_of_pages(array)) == {node}
    assert (array == 7).all()


def test_halves_of_a_range_lie_on_two_nodes() -> None:
    array = aligned_buffer(HUGE_PAGE)
    half = array.nbytes // 2
    for i, node in enumerate(NODES):
        numa.bind(array.ctypes.data + i * half, half, node)
    assert {(node, half) for node in NODES} <= {(n, size) for n, _, size in bound_ranges()}
    array[:] = 1
    assert node_of_pages(array).tolist() == [n for n in NODES for _ in range(half // 4096)]


def test_nodes_of_cpus_are_those_the_nodes_list() -> None:
    for node in cpu.numa_nodes():
        assert {numa.node_of_cpu(i) for i in node.cpus} <= {node.id}


def test_the_placement_checks_see_what_is_missing() -> None:
    two = engine.EngineLayout(4, 2, NODES)
    assert "workers per node" in str(misplaced_workers(two))
    assert "wanted about" in str(misplaced_weights(two, large()))
    one = engine.EngineLayout(2, 1, NODES[1:])
    wrong = aligned_buffer(large().data.nbytes)
    wrong[:] = 1
    numa.bind(wrong.ctypes.data, wrong.nbytes, NODES[1])
    assert misplaced_weights(one, large()) is None
    numa.bind(wrong.ctypes.data, HUGE_PAGE, NODES[0])
    assert "the layout has" in str(misplaced_weights(one, large()))


# -- the same bits
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [2, 3, 4])
@pytest.mark.parametrize(
    ("weight_format", "has_bias"), [("int4", False), ("int8", True), ("bf16", False)]
)
def test_two_parts_give_the_bits_of_one_and_of_the_reference(
    weight_format: str, has_bias: bool, num_threads: int
) -> None:
    packed, want = small(weight_format, has_bias)
    for threadpool_count in (1, 2):
        with layout_of(num_threads, threadpool_count):
            moe = ktk.MoE(packed)
            for num_tokens in (1, 3, TOKENS):
                for _ in range(3):  # whichever worker is first
                    assert_exact(want[:num_tokens], moe(*inputs(num_tokens)))
            del moe


@pytest.mark.parametrize("has_gate", [True, False])
def test_two_parts_give_the_packed_experts_back(has_gate: bool) -> None:
    spec = MoESpec(4, 64, 272, "int4", has_gate=has_gate, has_bias=True)
    packed = pack_all(spec, random_experts(spec, 1))
    with layout_of(4, 2):
        assert_exact(packed.data, ktk.MoE(packed).packed.data)


def test_a_refused_binding_is_a_warning_and_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(numa, "bind", refuse)
    packed, want = small("int8")
    with layout_of(4, 2), caplog.at_level("WARNING", "ktk"):
        assert_exact(want[:3], ktk.MoE(packed)(*inputs(3)))
    assert caplog.text.count("refused") == 1


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_two_parts_give_the_same_linear(projection: str) -> None:
    packed, _ = small("int8")
    x = random_hidden(33, HIDDEN if projection == "gate_up" else INTERMEDIATE, 5)
    ids = np.arange(33) % EXPERTS
    got = []
    for threadpool_count in (1, 2):
        with layout_of(4, threadpool_count):
            got.append(ktk.MoE(packed).linear(projection, x, ids))
    assert_exact(*got)


def test_a_part_may_be_empty() -> None:
    spec = MoESpec(4, 64, 16, "int8")  # one panel of channels, in one of two parts
    packed = pack_all(spec, random_experts(spec, 1))
    x, (ids, weights) = random_hidden(5, 64, 2), random_routing(5, 2, 4, 3)
    with layout_of(4, 2):
        got = ktk.MoE(packed)(x, ids, weights)
    assert_exact(ExactExperts(packed).forward(x, ids, weights), got)


def test_a_forked_child_gives_the_same_bits() -> None:
    packed, want = small("int8")
    with layout_of(4, 2):
        moe = ktk.MoE(packed)
        moe(*inputs(3))
        pid = os.fork()
        if pid == 0:
            os._exit(0 if np.array_equal(moe(*inputs(3)), want[:3]) else 1)
        assert os.waitpid(pid, 0)[1] == 0
        del moe


# -- placement
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_threads", "threadpool_count", "numa_nodes"),
    [
        (2, 2, NODES),
        (3, 2, NODES),
        (4, 2, NODES),
        (4, 2, NODES[::-1]),
        (4, 2, None),
        (2, None, NODES[1:]),
        (2, 1, NODES[:1]),
        (4, None, None),
    ],
)
def test_workers_and_weights_are_where_the_layout_says(
    num_threads: int, threadpool_count: int | None, numa_nodes: tuple[int, ...] | None
) -> None:
    packed = large()
    with layout_of(num_threads, threadpool_count, numa_nodes) as layout:
        assert layout.threadpool_count == len(layout.numa_nodes)
        moe = ktk.MoE(packed)
        moe(*inputs(3, 512))
        assert_placed(layout, packed)
        del moe


def test_a_process_confined_to_one_node_uses_that_node() -> None:
    callers = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {i for i in callers if numa.node_of_cpu(i) == NODES[1]})
    try:
        with layout_of(2) as layout:
            assert layout.numa_nodes == NODES[1:]
            moe = ktk.MoE(large())
            moe(*inputs(3, 512))
            assert_placed(layout, large())
            del moe
    finally:
        os.sched_setaffinity(0, callers)


def test_memory_of_an_moe_goes_with_it() -> None:
    before = sorted(bound_ranges())
    with layout_of(4, 2):
        moe = ktk.MoE(large())
        moe(*inputs(3, 512))
        del moe
    assert sorted(bound_ranges()) == before
    deadline = time.monotonic() + 10
    while worker_cpus() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker_cpus() == []


@pytest.mark.parametrize("node", NODES)
def test_the_callers_affinity_is_given_back(node: int) -> None:
    callers = os.sched_getaffinity(0)
    packed, want = small("int8")
    with layout_of(4, 2):
        moe = ktk.MoE(packed)
        confined = {i for i in callers if numa.node_of_cpu(i) == node}
        os.sched_setaffinity(0, confined)
        try:
            for _ in range(20):
                assert_exact(want[:1], moe(*inputs(1)))
                assert os.sched_getaffinity(0) == confined
        finally:
            os.sched_setaffinity(0, callers)
        del moe


def test_wrapper_beside_torch_is_placed_and_exact() -> None:
    """In a process of its own: torch takes half a minute to import in an emulated machine."""
    code = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/machine']
import numpy as np, test_numa
from make import wrapper_cases as cases
first, second = test_numa.NODES
wrapper = cases.loaded(
    cpuinfer_threads=4, threadpool_count=2, numa_nodes=[second, first], method="auto"
)
case = cases.routed(5)
for _ in range(5):
    wrapper.submit_forward(*case)
    cases.assert_same_bits(cases.exact(wrapper, *case), wrapper.sync_forward(case[0]))
    cases.assert_same_bits(cases.exact(wrapper, *case), wrapper.forward(*case))
layout = test_numa.engine.acquire(wrapper)
assert layout.numa_nodes == (second, first)
assert test_numa.misplaced_workers(layout) is None, test_numa.misplaced_workers(layout)
assert {node for node, *_ in test_numa.bound_ranges()} == {first, second}
print("placed")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, TESTS],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout == "placed\n", done.stderr


def test_a_node_without_cpus_or_out_of_range_is_refused() -> None:
    absent = max(node.id for node in cpu.numa_nodes()) + 1
    with pytest.raises(ValueError, match=f"no node \\[{absent}\\]"), layout_of(2, 1, (absent,)):
        pass
    array = aligned_buffer(HUGE_PAGE)
    with pytest.raises(OSError, match=f"node {absent}") as raised:
        numa.bind(array.ctypes.data, array.nbytes, absent)
    assert raised.value.errno == errno.EINVAL
