"""What every test begins and ends with."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator

import pytest

# Several processes test at once, each with a thread a core. OpenMP's threads spin where they wait:
# beside another process two took 5 times the CPU time of one, two that sleep 0.9 times. So do
# NumPy's, which reads this when it is imported: of small products 35 s of CPU time with two, 22 s
# with one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests, or with a browser, begin: at the end one core would wait for them."""
    long = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "browser")))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _warnings_come_again() -> None:
    """A warning that an earlier test has seen is not the last of its kind."""
    from ktk import log

    log.forget_warnings()


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    """Of tiny models a team of threads only waits: 59 s of CPU time with two, 15 s with one."""
    if (torch := sys.modules.get("torch")) is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _garbage_is_new() -> Iterator[None]:
    """What modules and tests before have left alive is not gone through again: transformers
    collects garbage for every batch it serves, 0.2 s with a million objects.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _engines_end() -> Iterator[None]:
    """Stop the generation threads that a failed test has left:
    Python would wait for them at its end.
    """
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        manager = getattr(getattr(thread, "_target", None), "__self__", None)
        if not thread.daemon and hasattr(manager, "stop"):
            manager.stop()
