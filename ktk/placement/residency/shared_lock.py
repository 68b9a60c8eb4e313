"""A lock of Python's that is also that of native calls, for a ``threading.Condition``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class SharedLock:
    """An RLock and, within, ``native``'s lock. ``settle`` runs each time both have been taken: what
    native calls did meanwhile is written down before anybody looks.

    native : lock(), unlock(), and ask(change), told how many wait for a condition. Native calls
    must have its lock only for a moment, and not wait for Python then.
    """

    def __init__(self, native: Any, settle: Callable[[], None]) -> None:
        self._lock: Any = threading.RLock()
        self._native, self._settle, self._depth = native, settle, 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not self._lock.acquire(blocking, timeout):
            return False
        self._depth += 1
        if self._depth == 1:
            self._native.lock()
            self._settle()
        return True

    __enter__ = acquire

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._native.unlock()
        self._lock.release()

    def __exit__(self, *_: object) -> None:
        self.release()

    # What threading.Condition asks of a lock that is taken several times.

    def _release_save(self) -> tuple[int, Any]:
        depth, self._depth = self._depth, 0
        self._native.ask(1)
        self._native.unlock()
        return depth, self._lock._release_save()

    def _acquire_restore(self, saved: tuple[int, Any]) -> None:
        depth, state = saved
        self._lock._acquire_restore(state)
        self._native.lock()
        self._native.ask(-1)
        self._depth = depth
        self._settle()

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())
