"""Find torch's OpenMP runtime, so that the thread pool can run on its threads instead of beside
them.

After each of its own parallel regions torch's threads spin for some milliseconds. ktk's workers on
the same cores would get part of each core; run on torch's threads, its calls start hot instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

from ktk._cy import native_module

is_pending = True  # until torch was imported and looked at


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """The calling thread's passes through a model of which all that takes long is ktk's: ktk runs
    on its own threads and torch, for the little between, on this one.

    torch's threads wait for each other at every region's end. Where one does not run, because
    another process has its core, all wait for it; ktk's caller does the tasks of a thread that has
    not come. And threads that spin after a region take a core from those that work.
    """
    native, torch = native_module(), sys.modules["torch"]
    before, count = native.own_threads_only(2), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        native.own_threads_only(before)


def borrow(native: Any) -> None:
    """Once torch is imported: hand its GOMP_parallel to the compiled pool.

    To be called while ``is_pending``.
    """
    global is_pending
    if not is_pending or "torch" not in sys.modules:
        return
    is_pending = False
    address = _gomp_parallel()
    if address:
        native.borrow_threads(address)


def _gomp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch loaded (GNU's,
    Intel's or LLVM's); 0 if there is none.
    """
    folder = os.path.dirname(getattr(sys.modules["torch"], "__file__", None) or "")
    try:
        with open("/proc/self/maps") as maps:
            files = {
                line.split(maxsplit=5)[5].strip()
                for line in maps
                if "omp" in line and ".so" in line
            }
    except OSError:
        return 0
    names = ("libgomp", "libiomp5", "libomp")
    loaded = [f for f in sorted(files) if os.path.basename(f).startswith(names)]
    # Torch ships its runtime in its own folder, or beside it in torch.libs; a distribution's build
    # uses the system's.
    loaded.sort(key=lambda f: not f.startswith(folder))
    for file in loaded:
        try:
            library = ctypes.CDLL(file, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0
