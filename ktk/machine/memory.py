"""Memory for packed experts: page aligned, in huge pages where the OS gives them (6-37 % of
decode speed).
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
from pathlib import Path

import numpy as np

from ktk.machine import numa

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
HUGE_PAGE = 2 << 20


def aligned_buffer(num_bytes: int) -> np.ndarray:
    """Zeroed uint8 (num_bytes,), aligned to 2 MiB, huge-page advised where the OS has them."""
    size = max(-(-num_bytes // HUGE_PAGE), 1) * HUGE_PAGE
    # Private: the OS makes no huge pages of shared memory, mmap's default. One more to begin at a
    # multiple.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size + HUGE_PAGE, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + num_bytes]


def huge_share(arrays: list[np.ndarray]) -> float | None:
    """The part, 0 to 1, of the arrays' resident memory that lies in huge pages; None where the
    system does not tell.

    Counted by mapping (/proc/self/smaps): a mapping that holds one of the arrays counts as a whole.
    """
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return None
    starts = sorted(array.ctypes.data for array in arrays if array.size)
    resident = huge = 0
    is_ours = False
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            at = bisect.bisect_left(starts, begin)
            is_ours = at < len(starts) and starts[at] < end
        elif is_ours and name == "Rss:":
            resident += int(rest.split()[0])
        elif is_ours and name in ("AnonHugePages:", "FilePmdMapped:", "ShmemPmdMapped:"):
            huge += int(rest.split()[0])
    return huge / resident if resident else None


def node_of_pages(array: np.ndarray) -> np.ndarray:
    """int32 (num_pages,): the NUMA node of each 4 KiB page of a C-contiguous array,
    as ``numa.page_nodes`` tells it.
    """
    if not array.flags.c_contiguous:
        raise ValueError("the array has gaps between its rows: must be C-contiguous")
    return numa.page_nodes(array.ctypes.data, array.nbytes)


def give_back_freed() -> bool:
    """From now on have the C library give freed memory of 128 KiB and more back to the system at
    once, whatever it learns of the process.

    By itself glibc keeps more and more, as larger blocks are freed: it never gives back blocks
    below the largest it has seen, up to 32 MiB. That saves time and costs memory. Returns whether
    the library can be told (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 128 << 10) and mallopt(_M_MMAP_THRESHOLD, 128 << 10))


def release_pages(array: np.ndarray) -> bool:
    """Give the whole pages within a C-contiguous array of ``aligned_buffer`` back to the system;
    they are zeros when they are looked at next. Whether it took them.
    """
    begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or end <= begin:
        return False
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    return not madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def peak_memory() -> int:
    """The most memory this process has had so far, bytes; 0 where Linux's /proc is not."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return next((int(words[1]) * 1024 for words in lines if words[:1] == ["VmHWM:"]), 0)
    return 0
