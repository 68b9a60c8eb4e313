"""A forked child has the parent's memory and one thread: locks are free, callbacks have run,
the process is another.
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ktk import fork
from make import ROOT
from make.children import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def test_a_lock_that_another_thread_holds_is_free_in_the_child() -> None:
    lock, held, over = fork.Lock(), threading.Event(), threading.Event()
    process, renewed = fork.process(), []
    fork.in_child(lambda: renewed.append(lock))

    def hold() -> None:
        with lock:
            held.set()
            over.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that waits for the lock is killed
            with lock:
                os._exit(0 if renewed and fork.process() != process else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
        holder.join()
    assert not renewed and fork.process() == process


def test_no_other_module_asks_for_forks() -> None:
    """Three take the process's number for a name of a temporary file."""
    sources = [*ROOT.glob("ktk/**/*.py"), *ROOT.glob("ktk/**/*.p[xy][xdi]")]
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in sources}
    found = {name for name, text in texts.items() if "getpid" in text or "at_fork" in text}
    files = {"ktk/checkpoint/packed.py", "ktk/demo/smollm2.py", "ktk/placement/masks/files.py"}
    assert found == {"ktk/fork.py", "ktk/_cy/bind/pool.pxi", *files}


KEPT = """
import sys
import ktk
from ktk.experts.spec import MoESpec
from make.cases import pack_all, random_experts
spec = MoESpec(4, 64, 96, "int8")
sys.kept = ktk.MoE(pack_all(spec, random_experts(spec, 1)))
"""


def test_a_pool_that_outlives_pythons_modules_says_nothing() -> None:
    """``sys`` goes last of all. An error in there has neither name nor traceback."""
    assert run_python(KEPT) == ""
