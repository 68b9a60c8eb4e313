"""under_load.py signals|forks|threads tiles|vectors: MoE calls while something goes on
beside them.

Prints the calls made and the events beside them; fails if a call's result has another bit than one
made in peace.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

import numpy as np
import torch

import ktk
from ktk.experts.spec import MoESpec
from make import tile_code as tc
from make.cases import pack_all, random_experts

SECONDS = 1.0
SA_SIGINFO, SA_RESTART = 4, 0x10000000


class Action(ctypes.Structure):
    """struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Work:
    """One layer and what it makes of fixed inputs, enough rows an expert for tiles."""

    def __init__(self, kind: str) -> None:
        spec = MoESpec(4, 256, 192, "int8")
        method = "AMXINT8" if kind == "tiles" else "auto"
        self.moe = ktk.MoE(pack_all(spec, random_experts(spec, 1)), method=method, num_threads=2)
        assert kind != "tiles" or self.moe.backend == "AMXINT8", self.moe.backend
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(48, 256, generator=generator)
        self.ids = torch.arange(48)[:, None] % 4 * torch.ones(1, 2, dtype=torch.int64)
        self.ids[:, 1] = (self.ids[:, 0] + 1) % 4
        self.weights = torch.full((48, 2), 0.5)
        self.want = self.moe.forward(self.x, self.ids, self.weights).clone()

    def is_right(self) -> bool:
        return torch.equal(self.want, self.moe.forward(self.x, self.ids, self.weights))


def repeat(work: Work, until: float) -> int:
    calls = 0
    while time.monotonic() < until:
        if not work.is_right():
            raise SystemExit(f"call {calls} has other bits")
        calls += 1
    return calls


def handler(kind: str, counter: np.ndarray, keep: list[np.ndarray]) -> tc.Program:
    """Machine code that overwrites registers of the kernels and counts."""
    count = tc.load(tc.RAX, counter.ctypes.data) + b"\x48\xff\x00"  # inc qword [rax]
    if kind == "vectors":  # vpcmpeqd ymm<n>, ymm<n>, ymm<n>
        ones = [bytes([0xC5, (~n & 15) << 3 | 5, 0x76, 0xC0 | n << 3 | n]) for n in range(8)]
        return tc.Program([*ones, count, b"\xc5\xf8\x77"])  # vzeroupper
    keep.append(np.zeros(64, np.uint8))
    keep[0][0], keep[0][16:32:2], keep[0][48:56] = 1, 64, 16
    keep.append(np.full(1024, 0x55, np.uint8))
    code = [tc.load(tc.RAX, keep[0].ctypes.data) + tc.memory("ldtilecfg")]
    code += [tc.load(tc.RAX, keep[1].ctypes.data), tc.load(tc.RCX, 64)]
    code += [tc.memory("tileloadd", n, index=tc.RCX) for n in range(8)]
    return tc.Program([*code, tc.dot("tdpbssd", 0, 1, 2), count, tc.tilerelease()])


def signals(kind: str) -> tuple[int, int]:
    keep: list[np.ndarray] = []
    work, counter = Work(kind), np.zeros(1, np.int64)
    program = handler(kind, counter, keep)
    action = Action(program.address, (ctypes.c_byte * 128)(), SA_SIGINFO | SA_RESTART, None)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.sigaction(int(signal.SIGALRM), ctypes.byref(action), None) == 0
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    calls = repeat(work, time.monotonic() + SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return calls, int(counter[0])


def forks(kind: str) -> tuple[int, int]:
    work, made, until = Work(kind), [], time.monotonic() + SECONDS
    beside = threading.Thread(target=lambda: made.append(repeat(work, until)))
    beside.start()
    children = 0
    while time.monotonic() < until or children < 10:
        if (pid := os.fork()) == 0:
            os._exit(0 if work.is_right() and work.is_right() else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            raise SystemExit(f"child {children}: {status}")
        children += 1
    beside.join()
    return made[0], children


def threads(kind: str) -> tuple[int, int]:
    works, made, until = [Work(kind), Work(kind)], [], time.monotonic() + SECONDS
    beside = [
        threading.Thread(target=lambda i=i: made.append(repeat(works[i % 2], until)))
        for i in range(6)
    ]
    for thread in beside:
        thread.start()
    for thread in beside:
        thread.join()
    if len(made) != 6:
        raise SystemExit("a thread failed")
    return sum(made), sum(made)


if __name__ == "__main__":
    print(*{"signals": signals, "forks": forks, "threads": threads}[sys.argv[1]](sys.argv[2]))
