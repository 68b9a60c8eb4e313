"""How far a reader follows a call: the files it passes, counted while it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ktk
from ktk.machine import cpu
from make import wrapper_cases as cases

PACKAGE = Path(ktk.__file__).parent
# What the compiled half of a call to the operator passes, in this order.
NATIVE = (
    "_cy/bind/experts.pxi",
    "_cy/kernels/moe.c",
    "_cy/kernels/pool.c",
    "_cy/kernels/moe_tasks.c",
    "_cy/kernels/operand.h",
    "_cy/kernels/rows.c",
    "_cy/kernels/gemm.c",
)


def files_of(call: Any) -> list[str]:
    """The package's Python files that a call enters, each time from another file."""
    passed: list[str] = []

    def see(frame: FrameType, event: str, argument: Any) -> None:
        path, caller = frame.f_code.co_filename, frame.f_back
        if event != "call" or not Path(path).is_relative_to(PACKAGE):
            return
        name = str(Path(path).relative_to(PACKAGE))
        if (caller is None or caller.f_code.co_filename != path) and passed[-1:] != [name]:
            passed.append(name)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return passed


@pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
def test_the_walk_of_wrapper_forward_is_fourteen_files() -> None:
    wrapper = cases.loaded(method="auto")
    case = cases.routed(5)
    wrapper.forward(*case)
    passed = files_of(lambda: wrapper.forward(*case))
    assert all((PACKAGE / name).exists() for name in NATIVE)
    assert len({*passed, *NATIVE}) <= 14, passed
    again = {name: passed.count(name) for name in passed if passed.count(name) > 2}
    assert not again, f"entered and entered again: {passed}"
