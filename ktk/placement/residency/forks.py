"""A fork waits until no call of slots and no read of theirs runs.

A child forked amid a read would have part of an expert; with O_DIRECT the rest of it might even
come to the child alone. One forked amid a call would wait for its end.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from ktk import fork


class Pausing(Protocol):
    """What pauses around a fork: ``Slots``."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


_all: weakref.WeakSet[Pausing] = weakref.WeakSet()
_paused: list[Pausing] = []


def add(slots: Pausing) -> None:
    """From now on, as long as they live."""
    _all.add(slots)


def _pause_all() -> None:
    for slots in list(_all):
        slots.pause()
        _paused.append(slots)


def _resume_all() -> None:
    while _paused:
        _paused.pop().resume()


fork.around(_pause_all, _resume_all)
