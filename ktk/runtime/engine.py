"""One thread engine per process: its layout is fixed while anything uses it.

A second user that asks for another layout gets EngineError; one that asks for none takes what is there.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass

from ktk import cpu, env
from ktk.errors import EngineError


@dataclass(frozen=True)
class EngineLayout:
    """num_threads over threadpool_count parts on numa_nodes (one node id per part)."""

    num_threads: int
    threadpool_count: int
    numa_nodes: tuple[int, ...]


class Holder:
    """Something that uses the engine for the time of a call."""


_lock = threading.Lock()
_users: weakref.WeakSet[object] = weakref.WeakSet()
_layout: EngineLayout | None = None


def _renew_lock() -> None:
    """In a forked child: another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def acquire(
    user: object,
    num_threads: int | None = None,
    threadpool_count: int | None = None,
    numa_nodes: tuple[int, ...] | None = None,
) -> EngineLayout:
    """Register ``user`` (weakly) and return the layout it shares with all others.

    num_threads defaults to KTK_NUM_THREADS or the physical cores this process may use.
    Raises ValueError for a layout this machine cannot have, EngineError if it conflicts.
    """
    global _layout
    env.check()
    for name, value in (("num_threads", num_threads), ("threadpool_count", threadpool_count)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value <= 0
        ):
            raise ValueError(f"{name}={value!r}: must be a positive int")
    with _lock:
        current = _layout if len(_users) else None
        if current is not None:
            asked = (num_threads, threadpool_count, numa_nodes)
            have = (current.num_threads, current.threadpool_count, current.numa_nodes)
            if any(a is not None and a != h for a, h in zip(asked, have, strict=True)):
                raise EngineError(
                    f"the thread engine runs with num_threads={have[0]}, threadpool_count={have[1]}, "
                    f"numa_nodes={list(have[2])}; asked for {asked[0]}, {asked[1]}, "
                    f"{None if asked[2] is None else list(asked[2])}: one process has one layout, "
                    f"use the same numbers or drop the other MoE objects first"
                )
        else:
            current = _new_layout(num_threads, threadpool_count, numa_nodes)
            _layout = current
        _users.add(user)
        return current


def _new_layout(
    num_threads: int | None, threadpool_count: int | None, numa_nodes: tuple[int, ...] | None
) -> EngineLayout:
    threads = num_threads or env.num_threads() or cpu.num_physical_cores()
    count = threadpool_count or (len(numa_nodes) if numa_nodes else 1)
    present = tuple(node.id for node in cpu.numa_nodes()) or (0,)
    if numa_nodes is not None and len(numa_nodes) != count:
        raise ValueError(
            f"numa_nodes={list(numa_nodes)} has {len(numa_nodes)} entries: threadpool_count is {count}"
        )
    if threads < count:
        raise ValueError(
            f"num_threads={threads} is below threadpool_count={count}: each part needs a thread"
        )
    if count > len(present):
        raise ValueError(
            f"threadpool_count={count}: this machine has NUMA nodes {list(present)}; use at most {len(present)}"
        )
    nodes = numa_nodes if numa_nodes is not None else present[:count]
    strangers = [node for node in nodes if node not in present]
    if strangers:
        raise ValueError(
            f"numa_nodes={list(nodes)}: this machine has no node {strangers}; it has {list(present)}"
        )
    return EngineLayout(threads, count, tuple(nodes))
