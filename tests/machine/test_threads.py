"""The thread pool: own threads, torch's threads, forks and exits, all with the same bits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ktk import backends
from ktk._cy import native_module
from ktk.backends import Operands
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.machine import openmp as _openmp
from ktk.machine.threads import EngineLayout
from ktk.reference.moe import ExactExperts
from make import TESTS
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing
from make.pool_cases import case, run

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")


@pytest.fixture
def native() -> Iterator[Any]:
    """The extension; afterwards threads are borrowed as they are in a program that imported
    torch.
    """
    torch.set_num_threads(2)  # a team that ktk's threads may be
    yield native_module()
    torch.set_num_threads(1)
    native_module().borrow_threads(_openmp._gomp_parallel())


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_torchs_threads_give_the_same_bits_as_own_ones(native: Any, num_threads: int) -> None:
    runner, inputs = case(num_threads)
    run(runner, inputs)  # whatever this process borrows by itself is done now
    native.borrow_threads(0)
    own = run(runner, inputs)
    address = _openmp._gomp_parallel()
    assert address, "torch is imported here: its OpenMP runtime must be found"
    native.borrow_threads(address)
    for _ in range(20):
        torch.ones(256, 256) @ torch.ones(256, 256)
        assert_exact(own, run(runner, inputs))


def test_own_threads_borrow_none_and_leave_all_as_it_was(native: Any) -> None:
    runner, inputs = case(2)
    want, borrowed = run(runner, inputs), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(body: int, context: int, num_threads: int, _: int) -> None:
        borrowed.append(num_threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)(context)

    native.borrow_threads(ctypes.cast(parallel, ctypes.c_void_p).value)
    assert_exact(want, run(runner, inputs))
    assert borrowed and set(borrowed) == {2}
    borrowed.clear()
    with contextlib.suppress(KeyError), _openmp.own_threads():
        assert torch.get_num_threads() == 1
        assert_exact(want, run(runner, inputs))
        with _openmp.own_threads():
            assert_exact(want, run(runner, inputs))
        assert_exact(want, run(runner, inputs))
        raise KeyError
    assert not borrowed and torch.get_num_threads() == 2
    run(runner, inputs)
    assert borrowed


def test_a_child_of_a_process_that_borrowed_runs_on_its_own(native: Any) -> None:
    runner, inputs = case(2)
    want = run(runner, inputs)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(run(runner, inputs), want) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert_exact(want, run(runner, inputs))


def test_many_short_runs_end() -> None:
    """Runs that are over before a worker wakes, and runs after the workers slept."""
    code = """
import time, numpy as np, sys
sys.path.insert(0, sys.argv[1])
from make.pool_cases import case, run
runner, inputs = case(4)
one = tuple(a[:1] for a in inputs)
want = run(runner, one)
for i in range(3000):
    assert np.array_equal(run(runner, one), want)
    if i % 500 == 0:
        time.sleep(0.01)
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, TESTS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "ended\n", done.stderr


def test_the_callers_float_mode_changes_nothing() -> None:
    """Flush-to-zero is a mode of the calling thread; workers do not have it."""
    spec = MoESpec(6, 64, 48, "fp32")
    packed = pack_all(spec, random_experts(spec, 1))
    ids, weights = random_routing(33, 2, 6, 2)
    x = (random_hidden(33, 64, 3) * 1e-19).astype(np.float32)
    weights = (weights * 1e-4).astype(np.float32)
    backend = next(b for b in backends.backends().values() if b.why_not(spec) is None)
    runner, want = (
        backend.load(packed, EngineLayout(2)),
        ExactExperts(packed).forward(x, ids, weights),
    )
    assert torch.set_flush_denormal(True)
    try:
        got = [run(runner, (x, ids, weights)) for _ in range(20)]
        caller_flushes = bool(torch.tensor([1e-40]) * 1 == 0)
    finally:
        torch.set_flush_denormal(False)
    assert caller_flushes  # the caller's own mode is given back
    for result in got:
        assert_exact(want, result)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("int8", 0), ("bf16", 0)])
def test_experts_split_over_nodes_give_the_same_bits(name: str, group: int, count: int) -> None:
    """Parts on one node: what two nodes run (tests/machine/test_numa.py)
    but for where the memory is.
    """
    spec = MoESpec(
        6, 208, 272, name, group, has_bias=True
    )  # 13 and 17 panels: nothing halves evenly
    packed = pack_all(spec, random_experts(spec, 1))
    x, (ids, weights) = random_hidden(40, 208, 3), random_routing(40, 3, 6, 2)
    backend = next(b for b in backends.backends().values() if b.why_not(spec) is None)
    layout = EngineLayout(count + 1, count, (0,) * count, is_bound=True)
    runner, whole = backend.load(packed, layout), backend.load(packed, EngineLayout(1))
    want = ExactExperts(packed).forward(x, ids, weights)
    for tokens in (1, 3, 40):
        out = np.empty_like(x[:tokens])
        runner.forward(Operands(x[:tokens], ids[:tokens], weights[:tokens], None, out))
        assert_exact(want[:tokens], out)
    for projection, rows in (("gate_up", x), ("down", random_hidden(40, 272, 5))):
        experts = np.arange(40) % 6
        assert_exact(
            whole.linear(projection, rows, experts), runner.linear(projection, rows, experts)
        )
    assert np.array_equal(runner.packed().data, packed.data)


@pytest.mark.parametrize(
    "layout",
    [EngineLayout(1, 2, (0, 0), is_bound=True), EngineLayout(3, 1, (0,), ((0,),))],
    ids=["a part without a thread", "a thread without a core"],
)
def test_a_layout_that_could_not_finish_is_refused(layout: EngineLayout) -> None:
    spec = MoESpec(2, 64, 32, "int8")
    packed = pack_all(spec, random_experts(spec, 1))
    backend = next(b for b in backends.backends().values() if b.why_not(spec) is None)
    with pytest.raises(ValueError, match=f"num_threads={layout.num_threads}"):
        backend.load(packed, layout)


def test_thousands_of_layers_made_and_dropped_leave_nothing() -> None:
    """In a process of its own: what others have allocated here would hide it."""
    code = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from make.cases import pack_all, random_experts
import ktk
from ktk.experts.spec import MoESpec
spec = MoESpec(2, 64, 32, "int8")
packed = pack_all(spec, random_experts(spec, 1))
x, ids, weights = np.ones((3, 64), np.float32), np.array([[0, 1]] * 3), np.ones((3, 2), np.float32)
def made(count):
    for _ in range(count):
        ktk.MoE(packed, num_threads=2)(x, ids, weights)
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    threads, files = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
    return pages * os.sysconf("SC_PAGESIZE"), threads, files
made(300)
states = [made(500) for _ in range(4)]
# What is left over grows each time; what allocators keep does not.
growth = min(b[0] - a[0] for a, b in zip(states, states[1:]))
assert growth < 32 << 10, states
assert states[-1][1:] <= states[0][1:], states
print("nothing")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, TESTS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "nothing\n", done.stderr
