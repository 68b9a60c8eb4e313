"""The emulator beside the process's other signals, and what KTK_TILE=emulated makes of the CPU."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

import ktk
from ktk import backends
from ktk.cli import doctor
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from make import TESTS
from make.cases import pack_all, random_experts
from make.tile_machine import machine


def script(body: str) -> subprocess.CompletedProcess[str]:
    """Run ``body`` in a fresh process after the emulator's installation."""
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import signal, ctypes, numpy as np
from make import tile_code as tc
from ktk._cy import emulate_tiles
{body}
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_fault_ends_the_process_and_says_its_name(emulator: Any) -> None:
    done = script("emulate_tiles(); tc.Program(tc.tilezero(0))()")
    assert done.returncode == -signal.SIGILL
    assert "ktk tile emulator: tilezero: tiles_unconfigured: no ldtilecfg" in done.stderr


def test_other_illegal_instructions_end_the_process(emulator: Any) -> None:
    done = script("emulate_tiles(); tc.Program(b'\\x0f\\x0b')()")
    assert done.returncode == -signal.SIGILL
    assert done.stderr == ""


def test_a_sent_signal_is_passed_on(emulator: Any) -> None:
    """Though a tile instruction may stand where it arrives, it is nobody's instruction."""
    done = script(
        "signal.signal(signal.SIGILL, lambda *a: print('handled'))\n"
        "emulate_tiles(); signal.raise_signal(signal.SIGILL)"
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
    done = script("emulate_tiles(); signal.raise_signal(signal.SIGILL)")
    assert done.returncode == -signal.SIGILL


def test_the_handler_that_was_there_gets_what_is_not_ours(emulator: Any) -> None:
    """A handler written in machine code steps over ud2; tile instructions around it still run, and
    so do those that a handler of another signal executes between.
    """
    done = script(
        """
libc = ctypes.CDLL(None)
# void handler(int, siginfo_t *, ucontext_t *c): c->rip += 2, which lies at byte 168; [counter]++
counter = np.zeros(1, np.int64)
# Its own code, not a Program: that would keep registers as a callee must, and so may this one.
add_2 = b"\\x48\\x83\\x82\\xa8\\x00\\x00\\x00\\x02"
skip = tc.Program(add_2 + tc.load(0, counter.ctypes.data) + b"\\x48\\xff\\x00")
class Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_byte * 128),
                ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
SA_SIGINFO = 4
action = Action(skip.address, (ctypes.c_byte * 128)(), SA_SIGINFO, None)
assert libc.sigaction(int(signal.SIGILL), ctypes.byref(action), None) == 0
emulator = emulate_tiles()
zero, ud2 = tc.tilezero(0), b"\\x0f\\x0b"
config = np.zeros(64, np.uint8); config[[0, 16, 48]] = 1, 64, 16
start = tc.load(tc.RAX, config.ctypes.data) + tc.memory("ldtilecfg")
tc.Program([start, zero, ud2, zero, ud2, ud2, zero, tc.tilerelease()])()
assert counter[0] == 3, counter
assert emulator.counts()["tilezero"] == 3
# In a handler of another signal, on the same thread.
inner = tc.Program([start, zero, ud2])
action = Action(inner.address, (ctypes.c_byte * 128)(), SA_SIGINFO, None)
assert libc.sigaction(int(signal.SIGUSR1), ctypes.byref(action), None) == 0
signal.raise_signal(signal.SIGUSR1)
assert counter[0] == 4 and emulator.counts()["tilezero"] == 4
tc.Program(tc.tilerelease())()
print("ended")
"""
    )
    assert done.stdout == "ended\n", done.stderr


def test_ktk_tile_makes_the_features_count_as_present(monkeypatch, capsys, emulator: Any) -> None:
    tiles = {"amx_tile", "amx_int8", "amx_bf16"}
    monkeypatch.delenv("KTK_TILE", raising=False)
    if lacking := cpu.missing("avx512bf16", cpu.detect()):
        pytest.skip(f"AMX kernels also need {', '.join(lacking)}")
    assert not tiles & cpu.detect().names
    monkeypatch.setenv("KTK_TILE", "emulated")
    assert tiles <= cpu.detect().names
    assert cpu.detect().emulated == tiles
    assert not cpu.missing("amx", cpu.detect())
    assert doctor.diagnosis()["cpu"]["emulated"] == sorted(tiles)
    doctor.command()
    assert "amx_bf16 amx_int8 amx_tile (KTK_TILE: for tests" in capsys.readouterr().out
    monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", "amx_int8")
    assert cpu.detect().emulated == {"amx_tile", "amx_bf16"}
    monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", "")
    with pytest.raises(ValueError, match="KTK_TILE=emulated: the AMX kernels also need avx512vnni"):
        cpu._emulate_tiles(cpu.detect().names - {"avx512vnni"})


@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_emulated_amx_runs_when_named_and_never_by_auto(monkeypatch, caplog, method: str) -> None:
    found = machine()
    if found is None:
        pytest.skip("the CPU's own tiles are under test")
    monkeypatch.delenv("KTK_TILE", raising=False)
    if lacking := cpu.missing("avx512bf16", cpu.detect()):
        pytest.skip(f"AMX kernels also need {', '.join(lacking)}")
    spec = MoESpec(1, 64, 64, method.removeprefix("AMX").lower())
    packed = pack_all(spec, random_experts(spec, 1))
    x, ids, weights = torch.randn(12, 64), torch.zeros(12, 1, dtype=int), torch.ones(12, 1)
    assert ktk.MoE(packed, method=method).backend != method  # without KTK_TILE there are no tiles
    monkeypatch.setenv("KTK_TILE", "emulated")
    monkeypatch.setenv("KTK_STRICT_BACKEND", "1")
    found.reset_counts()
    auto = ktk.MoE(packed, method="auto")
    assert not auto.backend.startswith("AMX")
    want = auto.forward(x, ids, weights)
    assert not any(found.counts().values())
    named = ktk.MoE(packed, method=method)
    assert named.backend == method
    assert backends.backends()[method].kernel(spec).startswith("amx(emulated) int")
    assert torch.equal(want, named.forward(x, ids, weights))
    assert found.counts()["tdpbssd"] > 0
    monkeypatch.setenv("KTK_BACKEND", method)
    assert ktk.MoE(packed, method="auto").backend == method
