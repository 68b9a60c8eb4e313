"""What runs packed experts: every row of the native kernels, every other backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ktk import backends
from ktk._cy import emulate_tiles, native_module
from ktk._cy.isa import ISA_ROWS
from ktk.backends import Operands
from ktk.backends.base import Runner
from ktk.backends.llamafile import LlamafileBackend
from ktk.backends.native import NativeBackend, NativeRunner
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu
from ktk.machine.threads import EngineLayout

COMPILED = (NativeBackend, LlamafileBackend)  # by rows; LLAMAFILE's are in tests/backends
IMPLEMENTATIONS = [
    *(("native", row.name) for row in ISA_ROWS),
    *((n, "") for n, b in backends.backends().items() if not isinstance(b, COMPILED)),
]
# With the reference, which NUMPY runs: that it calls it rightly, a few tests see.
COMPARED = [row for row in IMPLEMENTATIONS if row[0] != "NUMPY"]


def each_of(rows: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """A test's ``implementation``."""
    return pytest.mark.parametrize("implementation", rows, ids=lambda one: one[1] or one[0])


implementations = each_of(IMPLEMENTATIONS)


def emulate_or_skip() -> Any:
    """The tile emulator, which runs the same machine code as silicon does."""
    if "amx_tile" in cpu.detect() and not cpu.detect().emulated:
        pytest.skip("the CPU has tiles: test_tile_machines.py counts in a process without them")
    try:
        return emulate_tiles()
    except ValueError as error:
        pytest.skip(f"amx: {error}")


def sums_on_tiles(implementation: tuple[str, str], name: str) -> bool:
    """Whether float weights are multiplied on tiles, which add in another order."""
    return implementation[1] == "amxbf16" and name == "bf16"


def load(
    implementation: tuple[str, str],
    packed: StoredExperts,
    num_threads: int = 2,
    num_parts: int = 1,
) -> Runner:
    """A runner of a named ISA row or backend; skips with the reason where it cannot run.

    num_parts : those of as many NUMA nodes, all on node 0; of the native rows only.
    """
    name, row = implementation
    layout = EngineLayout(num_threads)
    if num_parts > 1:
        layout = EngineLayout(num_threads, num_parts, (0,) * num_parts, is_bound=True)
    if name == "native":
        if native_module() is None:
            pytest.skip("the compiled extension is not built")
        if lacking := cpu.missing(row, cpu.detect()):
            if (
                not row.startswith("amx")
                or cpu.missing("avx512vnni", cpu.detect())
                or cpu.detect().refused_tiles
            ):
                pytest.skip(f"{row}: CPU lacks {', '.join(lacking)}")
            emulate_or_skip()
        return NativeRunner(packed, row, layout)
    backend = backends.backends()[name]
    if reason := backend.why_not(packed.spec):
        pytest.skip(f"{name}: {reason}")
    return backend.load(packed, layout)


def run(
    runner: Runner,
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    skip: np.ndarray | None = None,
    add: np.ndarray | None = None,
) -> np.ndarray:
    """What a runner's forward pass gives, float32 (num_tokens, hidden_size)."""
    out = np.full_like(x, 7)
    runner.forward(Operands(x, ids, weights, skip, out, add))
    return out
