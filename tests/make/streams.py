"""Streams that are threads of this process: for what runs on a GPU's where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Mark:
    """A point in a stream. Of a graph it is another with every replay."""

    def __init__(self) -> None:
        self.reached = threading.Event()


class Graph:
    """What a capture has recorded."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, Callable[[], None]]] = []
        self.marks: list[Mark] = []


class ThreadStreams:
    """``ktk.ops.stream_moe.Streams`` on the CPU: each stream a thread that does one step after the
    other, a little late, so that what is not ordered by marks goes wrong.
    """

    def __init__(self, late: float = 0.002) -> None:
        self.late = late
        self._numbers = itertools.count(1)
        self._queues: dict[int, queue.SimpleQueue[Callable[[], None] | None]] = {}
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.calls = 0
        self.graph: Graph | None = None
        self.main = self.new()

    def current(self) -> int:
        return self.main

    def new(self) -> int:
        handle = next(self._numbers)
        self._queues[handle] = queue.SimpleQueue()
        self._threads.append(threading.Thread(target=self._work, args=(handle,), daemon=True))
        self._threads[-1].start()
        return handle

    def close(self) -> None:
        for steps in self._queues.values():
            steps.put(None)
        for thread in self._threads:
            thread.join(20)
        assert not self.errors, self.errors

    def _work(self, handle: int) -> None:
        while (step := self._queues[handle].get()) is not None:
            time.sleep(self.late)
            try:
                step()
            except BaseException as error:
                self.errors.append(error)

    def _put(self, stream: int, step: Callable[[], None]) -> None:
        if self.graph is not None:
            self.graph.steps.append((stream, step))
        else:
            self._queues[stream].put(step)

    def use(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        assert stream in self._queues
        return contextlib.nullcontext()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, -7, dtype=dtype)  # nothing that a pass would make

    def copy(self, stream: int, to: torch.Tensor, source: torch.Tensor) -> None:
        assert to.dtype == source.dtype and to.shape == source.shape

        def step() -> None:
            to.copy_(source)

        self._put(stream, step)

    def call(self, stream: int, function: int, data: int) -> None:
        def step() -> None:
            self.calls += 1
            FUNCTION(function)(data)

        self._put(stream, step)

    def work(self, stream: int, function: Callable[[], Any]) -> None:
        self._put(stream, function)

    def mark(self, stream: int) -> Mark:
        mark = Mark()
        if self.graph is not None:
            self.graph.marks.append(mark)
        self._put(stream, lambda: mark.reached.set())
        return mark

    def wait(self, stream: int, mark: Mark) -> None:
        def step() -> None:
            assert mark.reached.wait(20)

        self._put(stream, step)

    def finish(self, mark: Mark) -> None:
        assert self.graph is None
        assert mark.reached.wait(20)

    def is_capturing(self, stream: int) -> bool:
        return self.graph is not None

    @contextlib.contextmanager
    def capturing(self) -> Any:
        self.graph = graph = Graph()
        try:
            yield graph
        finally:
            self.graph = None

    def replay(self, graph: Graph) -> None:
        """Put all steps on their streams again; returns when they are done."""
        for mark in graph.marks:
            mark.reached.clear()
        for stream, step in graph.steps:
            self._queues[stream].put(step)
        self.synchronise()

    def synchronise(self) -> None:
        for mark in [self.mark(stream) for stream in list(self._queues)]:
            self.finish(mark)
