"""One worker thread per process that runs tasks in the order they came: what makes submit_forward return.

Kernels have their own threads; this one only waits for them, so that the caller need not. It starts
with the first submit, is a daemon, and is made anew in a forked child.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ktk._cy import native_module
from ktk.errors import EngineError


class Ticket:
    """A submitted task: its result, or the exception it raised."""

    __slots__ = ("_done", "_pid", "_result", "error", "is_done", "was_raised")

    def __init__(self) -> None:
        self._done = threading.Lock()  # held until done: cheaper than an Event
        self._done.acquire()
        self._pid = os.getpid()
        self._result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.was_raised = False

    def run(self, task: Callable[[], Any]) -> None:
        try:
            self._result = task()
        except BaseException as error:  # kept for take(): the worker must live on
            self.error = error
        finally:
            self.is_done = True
            self._done.release()

    def wait(self) -> None:
        """Return once the task has run. EngineError in a forked child, where it never will."""
        if self.is_done:
            return
        if self._pid != os.getpid():
            raise EngineError(
                "the task was submitted before fork(), which does not copy the thread that runs it: "
                "submit it again in this process"
            )
        with self._done:
            pass

    def take(self) -> Any:
        """Wait, then hand over the result (once) or raise what the task raised."""
        self.wait()
        if self.error is not None:
            self.was_raised = True
            raise self.error
        result, self._result = self._result, None
        return result


class Fifo:
    """Tasks in, run one after the other: by a daemon thread, or by a caller who waits anyway."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], Ticket]] = SimpleQueue()
        self._lock = threading.Lock()
        self._turn = threading.RLock()  # held by whoever runs a task
        self._num_pending = 0  # queued, or running on the worker
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], Any]) -> Ticket:
        """Queue ``task``. Does not wait."""
        ticket = Ticket()
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="ktk-fifo", daemon=True)
                thread.start()
                self._thread = thread  # not before it runs
            self._num_pending += 1
            self._queue.put((task, ticket))
        return ticket

    def run(self, task: Callable[[], Any]) -> Ticket:
        """As submit, but on the calling thread if nothing is pending: saves two thread switches.

        An interrupt here leaves the queue as it was.
        """
        if self._num_pending:
            return self.submit(task)
        ticket = Ticket()
        with self._turn:
            ticket.run(task)
        return ticket

    def drain(self) -> None:
        """Wait until everything submitted so far has run."""
        if self._thread is not None:
            self.submit(lambda: None).wait()

    def _work(self) -> None:
        native = native_module()
        if native is not None:
            native.own_threads_only()  # torch keeps its threads for the caller
        while True:
            task, ticket = self._queue.get()
            with self._turn:
                ticket.run(task)
            with self._lock:
                self._num_pending -= 1
            del task, ticket  # a task holds weights and buffers: not until the next one comes


_fifo = Fifo()


def submit(task: Callable[[], Any]) -> Ticket:
    """Queue ``task`` on the process's one worker. Does not wait."""
    return _fifo.submit(task)


def run(task: Callable[[], Any]) -> Ticket:
    """Run ``task`` in its turn: at once, on this thread, if the process's queue is empty."""
    return _fifo.run(task)


def drain() -> None:
    """Wait until every task submitted so far in this process has run."""
    _fifo.drain()


def _renew() -> None:
    global _fifo
    _fifo = Fifo()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
atexit.register(drain)  # a kernel must not outlive the memory it reads
