"""Reads that run beside calls: first those that a call waits for; those ahead of calls only while
none of the others waits or runs, a few at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MOST_AHEAD = 2  # at a time: a call's read that comes meanwhile shares the disk with them

Read = Callable[[], None]


class Reads:
    """num_threads : reads at a time. Those ahead are told apart by their keys; none may raise. Safe
    to use from several threads.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="ktk-expert-reader")
        self._lock = threading.Lock()
        self._wanted: deque[Read] = deque()
        self._ahead: dict[int, Read] = {}  # in their order
        self._num_wanted = self._num_ahead = 0  # that run

    def want(self, read: Read) -> None:
        """A call waits for it."""
        with self._lock:
            self._wanted.append(read)
        self._threads.submit(self._work)

    def foresee(self, key: int, read: Read) -> None:
        """A call may want it soon."""
        with self._lock:
            self._ahead[key] = read
        self._threads.submit(self._work)

    def hurry(self, key: int) -> None:
        """A call waits for it now; nothing if it has begun."""
        with self._lock:
            if (read := self._ahead.pop(key, None)) is None:
                return
            self._wanted.append(read)
        self._threads.submit(self._work)

    def cancel(self, key: int) -> bool:
        """Whether it had not begun; it will not run then."""
        with self._lock:
            return self._ahead.pop(key, None) is not None

    def cancel_all(self) -> list[int]:
        """The keys of those ahead that had not begun; they will not run."""
        with self._lock:
            keys = list(self._ahead)
            self._ahead.clear()
        return keys

    def shutdown(self) -> None:
        """After all that are not cancelled."""
        self._threads.shutdown()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._wanted:
                    read, is_wanted = self._wanted.popleft(), True
                elif self._ahead and not self._num_wanted and self._num_ahead < MOST_AHEAD:
                    read, is_wanted = self._ahead.pop(next(iter(self._ahead))), False
                else:
                    return
                self._count(is_wanted, 1)
            try:
                read()
            finally:
                with self._lock:
                    self._count(is_wanted, -1)

    def _count(self, is_wanted: bool, change: int) -> None:
        if is_wanted:
            self._num_wanted += change
        else:
            self._num_ahead += change
