"""Python in processes of their own that have torch, transformers and ktk imported as they begin.

A server of processes imports them once, which takes seconds, and starts no thread; every child is
forked off it. What a child prints goes to files, or to a terminal.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ktk.cli import main
from make.command_line import Done

IMPORTED = [
    "torch.distributed",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "ktk.generate.open",
    "ktk.server.app",
    "ktk.server.serve",
    "make.cases",
]
# Libraries read these when they are loaded: they hold for every child.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "KTK_NUM_THREADS": "1"}


class Child:
    """A process that runs; what it prints, so far, is ``out`` and ``err``."""

    def __init__(self, process: BaseProcess, out: Path, err: Path) -> None:
        self._process, self._out, self._err = process, out, err
        assert process.pid is not None
        self.pid = process.pid

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.exitcode

    def until(self, is_so: Callable[[], bool], seconds: float = 60) -> None:
        """Wait for something that the child does."""
        end = time.monotonic() + seconds
        while not is_so():
            assert self.exit_code is None, f"ended with {self.exit_code}: {self.out}{self.err}"
            assert time.monotonic() < end, f"not within {seconds} s: {self.out}{self.err}"
            time.sleep(0.02)

    def wait(self, seconds: float = 60) -> int:
        """Its exit code."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still runs after {seconds} s: {self.out}{self.err}"
        return code

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


@contextlib.contextmanager
def forked(
    run: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    terminal: str | None = None,
) -> Iterator[Child]:
    """A child that calls ``run(*arguments)``, killed at the end of the block.

    ``environment``: more variables. ``terminal``: the path of what it reads and prints to.
    """
    _server_begins()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        files = [terminal] * 3 if terminal else [os.devnull, str(out), str(err)]
        own = {**os.environ, **ONE_THREAD, **(environment or {})}
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_begin, args=(files, own, run, arguments))
        process.start()
        child = Child(process, out, err)
        try:
            yield child
        finally:
            if process.exitcode is None:
                child.signal(signal.SIGKILL)
            process.join()
            process.close()


def ktk(*arguments: object, seconds: float = 60, **environment: str) -> Done:
    """The command line as a process: ``ktk(*arguments)``, with more variables."""
    own = {"COLUMNS": "200", **environment}
    with forked(main, [str(a) for a in arguments], environment=own) as child:
        code = child.wait(seconds)
        return Done(code, child.out, child.err)


def run_script(path: Path, *arguments: str) -> None:
    """In a child: a file of Python, as its interpreter would run it."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def _server_begins() -> None:
    before = dict(os.environ)
    paths = os.pathsep.join(path for path in sys.path if path)
    os.environ.update(ONE_THREAD, PYTHONPATH=paths)
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(
    files: list[str], environment: dict[str, str], run: Callable[..., Any], arguments: Any
) -> None:
    os.setsid()
    for number, (name, mode) in enumerate(zip(files, "rww", strict=True)):
        file = os.open(name, os.O_RDONLY if mode == "r" else os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    os.environ.clear()
    os.environ.update(environment)
    run(*arguments)
