"""What fork() leaves a child: the memory as it is, of the threads only the one that forked.

Threads of the parent neither finish their work in the child nor release their locks. What has
threads or hands out work remembers the ``process`` it was made in, what another thread may hold at
that moment is a ``Lock``, and what has to be made anew is told to ``in_child``. It lies below all
else, as the compiled pool asks it, too.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

process = os.getpid  # () -> int, another one in a forked child


def in_child(renew: Callable[[], None]) -> Callable[[], None]:
    """Call ``renew`` first thing in every forked child, in the order of registration;
    a decorator.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)
    return renew


def around(hold: Callable[[], None], release: Callable[[], None]) -> None:
    """Call ``hold`` before every fork, and ``release`` after it, in the parent and in the child:
    for what must be at rest while memory is copied.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release)


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """``with lock:`` as threading.Lock has it; in a forked child it is free,
    whoever held it in the parent. A copy is another lock.
    """

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self.renew()
        _locks.add(self)

    def renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, object]) -> Lock:
        return Lock()


@in_child
def _renew_locks() -> None:
    for lock in _locks:
        lock.renew()
