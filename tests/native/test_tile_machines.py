"""AMX silicon: the tile cases on it and, in a process that never asks for it, on the emulator;
kernels under load.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from ktk._cy import native_module
from ktk.machine import cpu
from make import ROOT, TESTS
from make.forked import forked, run_script

pytestmark = pytest.mark.slow

# oneDNN would ask for tiles at torch's first matrix product, and they would trap no more.
WITHOUT_TILES = {"KTK_TILE": "emulated", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


SMALL_STACK = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(2048)
given = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(given), None) == 0

from ktk.machine import cpu

print(cpu.why_not("amx", cpu.detect()))
"""


def has_tiles() -> bool:
    features = cpu.detect()
    return "amx_tile" in features and not features.emulated


def child(
    arguments: list[str], environment: dict[str, str], timeout: int
) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: permission for tiles passes through fork,
    not through exec.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))}
        | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_cases(environment: dict[str, str], *arguments: str) -> int:
    """The number of cases that passed; the child's own words if one failed."""
    done = child(["-m", "pytest", "-vv", "-rs", *arguments], environment, 900)
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or not passed:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}")
    return int(passed[1])


def test_tile_instructions_of_silicon_do_what_the_model_does() -> None:
    if not has_tiles():
        pytest.skip("the CPU has no tiles: test_tiles.py emulates them in its own process")
    assert run_cases({"TILES_UNDER_TEST": "silicon"}, f"{TESTS}/native/test_tiles.py") >= 25


def test_emulated_tile_instructions_do_what_the_model_does_and_name_faults() -> None:
    if not has_tiles():
        pytest.skip("the CPU has no tiles: test_tiles.py emulates them in its own process")
    files = ("test_tiles.py", "test_tile_faults.py", "test_tile_emulation.py")
    assert run_cases(WITHOUT_TILES, *(f"{TESTS}/native/{file}" for file in files)) >= 100


def test_emulated_kernels_on_a_cpu_with_tiles_are_the_exact_model() -> None:
    """On silicon test_kernels.py runs them here, against the same model."""
    if not has_tiles():
        pytest.skip("the CPU has no tiles: test_kernels.py emulates them in its own process")
    assert run_cases(WITHOUT_TILES, f"{TESTS}/native/test_kernels.py", "-k", "amx") >= 50


def test_a_small_signal_stack_that_keeps_tiles_away_is_said() -> None:
    """The kernel gives no permission where a signal's frame would not hold the tiles."""
    if not has_tiles():
        pytest.skip("the CPU has no tiles: test_cpu.py gives the reader the kernel's answer")
    done = child(["-c", SMALL_STACK], {}, 60)
    assert done.returncode == 0, done.stderr
    assert "an alternate signal stack is too small" in done.stdout


@pytest.mark.parametrize("what", ["signals", "forks", "threads"])
@pytest.mark.parametrize("kind", ["tiles", "vectors"])
def test_kernels_under_load_change_no_bit(what: str, kind: str) -> None:
    """Signals whose handler uses the kernels' registers, children that compute again,
    six threads at once.
    """
    if native_module() is None:
        pytest.skip("the compiled extension is not built")
    if kind == "tiles" and not has_tiles():
        pytest.skip(cpu.why_not("amx", cpu.detect()) or "the CPU's tiles are emulated")
    with forked(run_script, TESTS / "make" / "under_load.py", what, kind) as beside:
        assert beside.wait(120) == 0, beside.err
        calls, events = (int(n) for n in beside.out.split())
    assert calls >= 20
    assert events >= 10
