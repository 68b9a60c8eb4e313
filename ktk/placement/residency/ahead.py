"""Whether reading experts ahead of calls pays: judged by what calls did with them."""

from __future__ import annotations

WINDOW = 128  # experts that are judged together
REST = 1024  # calls without, after a window that did not pay


class Ahead:
    """An expert read ahead saves a call that read. One that the next call of its layer does not use
    costs half as much: the disk was idle, mostly, but another had to leave for it.

    is_on : whether to read ahead; after ``REST`` calls without it is tried again. Not thread-safe.
    """

    def __init__(self) -> None:
        self.is_on = True
        self._used = self._useless = self._rest = 0

    def judge(self, used: int, useless: int) -> None:
        """A call came to a layer for which so many were read ahead."""
        self._used += used
        self._useless += useless
        if self._used + self._useless < WINDOW:
            return
        if 2 * self._used < self._useless:
            self.is_on, self._rest = False, REST
        self._used = self._useless = 0

    def call(self) -> None:
        """A call came."""
        if self._rest:
            self._rest -= 1
            self.is_on = not self._rest
