"""A file as read-only memory: shared with every process that maps it, readable ahead, never a copy.

The pages belong to the page cache: the kernel drops and rereads them as it likes, so a file larger
than the memory is slow, never killed. What the map cannot promise: a file that another process cuts
off while it is mapped gives SIGBUS where ``preadv`` would give an error; replace model files by
renaming, as downloaders do.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ktk.checkpoint.safetensors import open_regular
from ktk.errors import CheckpointError

# madvise(WILLNEED) reads no more per call than the device's readahead window: of 64 MiB asked for
# at once 8 came where read_ahead_kb is 8192. Its usual value is 128.
ADVICE_STEP = 128 << 10
RESIDENCY_SAMPLES = 16


class MappedFile:
    """A regular file, mapped read-only.

    data : uint8 (size,), read-only; it and every view of it keep the map alive.
    Raises CheckpointError if the file cannot be opened or mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        fd, self.size = open_regular(path)
        self.data = np.empty(0, np.uint8)
        self._map: mmap.mmap | None = None
        try:
            if self.size:
                self._map = mmap.mmap(fd, self.size, access=mmap.ACCESS_READ)  # shared, PROT_READ
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: {self.size} bytes cannot be mapped: {error}") from None
        finally:
            os.close(fd)
        if self._map is not None:
            # ext4, Linux 6.18: 1024 of 1024 MiB in huge pages, 984 without the advice.
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do
                    self._map.madvise(mmap.MADV_HUGEPAGE)
            self.data = np.frombuffer(self._map, np.uint8)

    def will_need(self, begin: int, num_bytes: int) -> None:
        """Ask the OS to read bytes ``begin`` to ``begin + num_bytes`` ahead; returns before they
        are there.

        Takes 0.2 ms per MB that is not in memory, without the GIL. Only advice: failures are not
        told.
        """
        begin, end = _clipped(begin, num_bytes, self.size)
        if self._map is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        madvise = _c_function("madvise", ctypes.c_int)
        if madvise is None:
            return
        begin -= begin % mmap.PAGESIZE
        for start in range(begin, end, ADVICE_STEP):
            length = min(ADVICE_STEP, end - start)
            madvise(self.data.ctypes.data + start, length, mmap.MADV_WILLNEED)

    def is_resident(self, begin: int, num_bytes: int) -> bool:
        """Whether a few pages spread over the range are all in memory; True where the OS does not
        tell.

        Source: mincore(2). Linux tells the truth only to who may write the file, and says True to
        others.
        """
        begin, end = _clipped(begin, num_bytes, self.size)
        mincore = _c_function("mincore", ctypes.c_void_p)
        if self._map is None or mincore is None or begin == end:
            return True
        address = self.data.ctypes.data
        first, last = begin // mmap.PAGESIZE, (end - 1) // mmap.PAGESIZE
        status = ctypes.c_ubyte()
        steps = min(RESIDENCY_SAMPLES, last - first + 1)
        for i in range(steps):
            page = first + (last - first) * i // max(steps - 1, 1)
            if mincore(address + page * mmap.PAGESIZE, mmap.PAGESIZE, ctypes.byref(status)):
                return True
            if not status.value & 1:
                return False
        return True


def _clipped(begin: int, num_bytes: int, size: int) -> tuple[int, int]:
    begin = min(max(begin, 0), size)
    return begin, min(begin + max(num_bytes, 0), size)


@cache
def _c_function(name: str, last: type[Any]) -> Callable[..., int] | None:
    """A function (address, length, pointer or int) of the C library; None where there is none.

    ctypes lets go of the GIL, mmap.madvise does not.
    """
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, last)
    function.restype = ctypes.c_int
    return function
