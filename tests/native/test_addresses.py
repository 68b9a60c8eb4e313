"""Experts that move, go and come back between calls: same bits,
or an error before anything is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from ktk._cy import native_module
from ktk.backends import Operands
from ktk.backends.native import NativeRunner
from ktk.bench.blocks import random_matrix
from ktk.errors import BackendError
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.machine.threads import EngineLayout
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")

EXPERTS, TOKENS = 6, 9
TWO_PARTS = EngineLayout(2, 2, (0, 0), is_bound=True)


def packed(name: str) -> Callable[[], StoredExperts]:
    spec = MoESpec(EXPERTS, 96, 288, name, has_bias=True)
    return lambda: pack_all(spec, random_experts(spec, 1))


def blocks() -> StoredExperts:
    sizes = {"gate": (288, 96), "up": (288, 96), "down": (96, 288)}
    made = {name: random_matrix("Q8_0", EXPERTS, *size, 4) for name, size in sizes.items()}
    spec = MoESpec(EXPERTS, 96, 288, "gguf", activation_group=64)
    return StoredExperts(spec, **made)


CASES: dict[str, Callable[[], StoredExperts]] = {
    "int4": packed("int4"),
    "bf16": packed("bf16"),
    "Q8_0": blocks,
}
Place = tuple[int, str, np.ndarray]  # part, table, what stands there


class Mover:
    """A runner's experts, which it moves to other memory."""

    def __init__(self, runner: NativeRunner) -> None:
        self.native = runner.experts
        self.places = {e: [*self._tables(runner, e)] for e in range(EXPERTS)}

    def _tables(self, runner: NativeRunner, expert: int) -> Iterator[Place]:
        for i, part in enumerate(runner.parts):
            for name in self.native.tables:
                view = getattr(part, name)[expert]
                if name == "gate" and "up" not in self.native.tables:  # panels of both alternate
                    view = as_strided(view, (2 * view.size,), (1,))
                yield i, name, np.ascontiguousarray(view).view(np.uint8).reshape(-1)

    def move(self, expert: int) -> None:
        """To new memory; the bytes it had here are written over."""
        old = self.places[expert]
        new = []
        for part, name, data in old:
            copy = aligned_buffer(data.size)
            copy[:] = data
            new.append((part, name, copy))
        self.places[expert] = new
        self.bring(expert)
        for _, _, data in old:
            data[:] = 255

    def bring(self, expert: int) -> None:
        for part, name, data in self.places[expert]:
            self.native.set_address(part, name, expert, data.ctypes.data)

    def drop(self, expert: int) -> None:
        for part, name, _ in self.places[expert]:
            self.native.set_address(part, name, expert, 0)


def routed(experts: int = EXPERTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = random_hidden(TOKENS, 96, 2)
    return (x, *random_routing(TOKENS, 2, experts, 3))


def run(runner: NativeRunner, routing: tuple[np.ndarray, ...], skip: Any = None) -> np.ndarray:
    x, ids, weights = routing
    out = np.full_like(x, 7)
    runner.forward(Operands(x, ids, weights, skip, out))
    return out


@pytest.mark.parametrize("layout", [EngineLayout(2), TWO_PARTS], ids=["whole", "two parts"])
@pytest.mark.parametrize("case", CASES)
def test_moved_experts_give_the_same_bits(case: str, layout: EngineLayout) -> None:
    runner = NativeRunner(CASES[case](), "avx2", layout)
    want, mover = run(runner, routed()), Mover(runner)
    for expert in (0, 4, 5):
        mover.move(expert)
    assert_exact(want, run(runner, routed()))


@pytest.mark.parametrize("case", CASES)
def test_a_call_to_an_absent_expert_names_it_and_computes_nothing(case: str) -> None:
    runner = NativeRunner(CASES[case](), "avx2", EngineLayout(2))
    x, ids, weights = routed()
    ids[0], ids[1:] = (1, 4), np.where(np.isin(ids[1:], (1, 4)), 0, ids[1:])
    want, mover = run(runner, (x, ids, weights)), Mover(runner)
    for expert in (1, 4):
        mover.drop(expert)
    out = np.full_like(x, 7)
    with pytest.raises(BackendError, match="^experts 1, 4 are not in memory"):
        runner.forward(Operands(x, ids, weights, None, out))
    assert (out == 7).all()
    with pytest.raises(BackendError, match="^experts 4 are not in memory"):
        runner.linear("down", np.zeros((2, 288), np.float32), np.array([0, 4]))
    assert_exact(want[1:], run(runner, (x[1:], ids[1:], weights[1:])))  # others run meanwhile
    skip = np.isin(np.arange(EXPERTS), (1, 4))
    assert_exact(np.zeros((1, 96), np.float32), run(runner, (x[:1], ids[:1], weights[:1]), skip))
    for expert in (1, 4):
        mover.bring(expert)
    assert_exact(want, run(runner, (x, ids, weights)))


def test_experts_that_move_while_calls_run_give_the_same_bits() -> None:
    """An old place is written over as soon as set_address returns: no call may read it any more."""
    runner = NativeRunner(CASES["int4"](), "avx2", EngineLayout(2))
    want, mover = run(runner, routed()), Mover(runner)
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for expert in range(EXPERTS):
                mover.move(expert)

    mover_thread = threading.Thread(target=move)
    mover_thread.start()
    try:
        for _ in range(200):
            assert_exact(want, run(runner, routed()))
    finally:
        stop.set()
        mover_thread.join()


def test_an_address_of_what_there_is_not_is_refused() -> None:
    experts = NativeRunner(CASES["int4"](), "avx2", EngineLayout(1)).experts
    assert experts.tables == ("gate", "down", "gate_bias", "up_bias", "down_bias")
    for part, table, expert in ((1, "gate", 0), (0, "up", 0), (0, "gate", EXPERTS)):
        with pytest.raises(ValueError, match="there are 1 parts, tables gate, down"):
            experts.set_address(part, table, expert, 64)
    assert native_module() is not None and experts.address(0, "down", 0) > 0
