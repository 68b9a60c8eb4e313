"""One thread engine per process: its layout is fixed while anything uses it.

A second user that asks for another layout gets EngineError; one that asks for none takes what is
there.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from ktk import env
from ktk.errors import EngineError
from ktk.fork import Lock
from ktk.machine import cpu

MAX_PARTS = 16  # KTK_MAX_PARTS of the C side


@dataclass(frozen=True)
class EngineLayout:
    """How the process's threads and weights lie over the machine.

    num_threads : threads in all, the caller's counted. threadpool_count : parts they and every
        expert are split into.
    numa_nodes : the node of each part. cores : the CPUs each thread is pinned to, in the order of
        the parts; () = the OS decides. is_bound : weights are copied to memory of their part's
        node.
    """

    num_threads: int
    threadpool_count: int = 1
    numa_nodes: tuple[int, ...] = (0,)
    cores: tuple[tuple[int, ...], ...] = ()
    is_bound: bool = False


class Holder:
    """Something that uses the engine for the time of a call."""


_lock = Lock()
_users: weakref.WeakSet[object] = weakref.WeakSet()
_layout: EngineLayout | None = None


def acquire(
    user: object,
    num_threads: int | None = None,
    threadpool_count: int | None = None,
    numa_nodes: tuple[int, ...] | None = None,
) -> EngineLayout:
    """Register ``user`` (weakly) and return the layout it shares with all others.

    num_threads defaults to KTK_NUM_THREADS or the physical cores this process may use; numa_nodes
    to the nodes that have such cores, threadpool_count to their number.
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
                    f"the thread engine runs with num_threads={have[0]}, "
                    f"threadpool_count={have[1]}, numa_nodes={list(have[2])}; asked for "
                    f"{asked[0]}, {asked[1]}, {None if asked[2] is None else list(asked[2])}: one "
                    "process has one layout, use the same numbers or drop the other MoE objects "
                    "first"
                )
        else:
            current = _new_layout(num_threads, threadpool_count, numa_nodes)
            _layout = current
        _users.add(user)
        return current


def _new_layout(
    num_threads: int | None, threadpool_count: int | None, numa_nodes: tuple[int, ...] | None
) -> EngineLayout:
    threads = num_threads or cpu.default_threads()
    present = {node.id: node for node in cpu.numa_nodes()}
    cores = {node: cpu.cores_of(present[node].cpus) for node in present}
    usable = tuple(node for node in present if cores[node]) or tuple(present)
    if numa_nodes is not None:
        count = threadpool_count or len(numa_nodes)
    else:
        count = threadpool_count or min(len(usable), threads, MAX_PARTS)
    if numa_nodes is not None and len(numa_nodes) != count:
        raise ValueError(
            f"numa_nodes={list(numa_nodes)} has {len(numa_nodes)} entries: threadpool_count is "
            f"{count}"
        )
    if threads < count:
        raise ValueError(
            f"num_threads={threads} is below threadpool_count={count}: each part needs a thread"
        )
    most = min(len(present), MAX_PARTS)
    if count > most:
        raise ValueError(
            f"threadpool_count={count}: this machine has NUMA nodes {list(present)}; use at most "
            f"{most}"
        )
    nodes = numa_nodes if numa_nodes is not None else (usable + tuple(present))[:count]
    strangers = [node for node in nodes if node not in present]
    if strangers:
        raise ValueError(
            f"numa_nodes={list(nodes)}: this machine has no node {strangers}; it has "
            f"{list(present)}"
        )
    is_named = threadpool_count is not None or numa_nodes is not None
    return EngineLayout(
        threads,
        count,
        tuple(nodes),
        _pin(threads, [cores[node] for node in nodes], is_named),
        is_bound=len(present) > 1,
    )


def _pin(
    threads: int, cores: list[list[tuple[int, ...]]], is_named: bool
) -> tuple[tuple[int, ...], ...]:
    """CPUs of each thread: a physical core of its part's node, where there is one for each.

    Threads that leave cores free may move within their node unless the layout was named: another
    process's would be pinned to the same ones.
    """
    count = len(cores)
    parts = [thread * count // threads for thread in range(threads)]
    wanted = [parts.count(part) for part in range(count)]
    is_short = any(want > len(have) for want, have in zip(wanted, cores, strict=True))
    if is_short or (not is_named and threads < sum(map(len, cores))):
        if not all(cores) or (count == 1 and not is_named):
            return ()
        return tuple(tuple(cpu for core in cores[part] for cpu in core) for part in parts)
    place = [thread - parts.index(part) for thread, part in enumerate(parts)]
    return tuple(cores[part][i] for part, i in zip(parts, place, strict=True))
