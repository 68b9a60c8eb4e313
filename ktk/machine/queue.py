"""The process's queue of tasks, run one after the other in the order they came: what makes
submit_forward return.

A daemon thread runs them, or whoever waits for one: a caller that submits and at once waits pays
for no thread switch. Kernels have their own threads. The daemon starts with the first submit and is
made anew in a forked child.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ktk import fork
from ktk._cy import native_module
from ktk.errors import EngineError


class Ticket:
    """A submitted task: its result, or the exception it raised."""

    __slots__ = ("_fifo", "_result", "error", "is_done", "was_raised")

    def __init__(self, fifo: Fifo) -> None:
        self._fifo = fifo
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

    def wait(self) -> None:
        """Return once the task has run, here if nobody has begun it.

        EngineError in a forked child.
        """
        if self.is_done:
            return
        if self._fifo.made_in != fork.process():
            raise EngineError(
                "the task was submitted before fork(), which does not copy the thread that runs "
                "it: submit it again in this process"
            )
        while not self.is_done:
            self._fifo.run_next(self)

    def take(self) -> Any:
        """Wait, then hand over the result (once) or raise what the task raised."""
        self.wait()
        if self.error is not None:
            self.was_raised = True
            raise self.error
        result, self._result = self._result, None
        return result


class Fifo:
    """Tasks in, run one after the other."""

    def __init__(self) -> None:
        self._tasks: deque[tuple[Callable[[], Any], Ticket]] = deque()
        self._turn = threading.RLock()  # held by whoever takes and runs a task
        self._start = threading.Lock()
        self._news = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self.made_in = fork.process()

    def submit(self, task: Callable[[], Any]) -> Ticket:
        """Queue ``task``. Does not wait."""
        ticket = Ticket(self)
        if self._thread is None:
            self._start_thread()
        self._tasks.append((task, ticket))
        self._news.release()
        return ticket

    def run(self, task: Callable[[], Any]) -> Ticket:
        """As submit, but on the calling thread if nothing is pending.

        An interrupt leaves the queue as it was.
        """
        if not self._tasks and self._turn.acquire(blocking=False):
            try:
                if not self._tasks:
                    ticket = Ticket(self)
                    ticket.run(task)
                    return ticket
            finally:
                self._turn.release()
        return self.submit(task)

    def run_next(self, wanted: Ticket | None = None) -> None:
        """Run the oldest task, unless there is none or ``wanted`` has run meanwhile."""
        with self._turn:
            if self._tasks and not (wanted and wanted.is_done):
                task, ticket = self._tasks.popleft()
                ticket.run(task)

    def drain(self) -> None:
        """Wait until everything submitted so far has run."""
        if self._thread is not None:
            self.submit(lambda: None).wait()

    def _start_thread(self) -> None:
        with self._start:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="ktk-fifo", daemon=True)
                thread.start()
                self._thread = thread  # not before it runs

    def _work(self) -> None:
        native = native_module()
        if native is not None:
            native.own_threads_only()  # torch keeps its threads for the caller
        while True:
            self._news.acquire()
            self.run_next()


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


@fork.in_child
def _renew() -> None:
    global _fifo
    _fifo = Fifo()


atexit.register(drain)  # a kernel must not outlive the memory it reads
