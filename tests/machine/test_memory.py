"""Memory for weights: alignment, and how much of it lies in huge pages."""

from __future__ import annotations

import ctypes
import mmap
import platform
import resource
from pathlib import Path

import numpy as np
import pytest

from ktk.machine import cpu, memory
from ktk.machine.memory import HUGE_PAGE, aligned_buffer, give_back_freed, huge_share
from make.forked import forked


def small_pages(num_bytes: int) -> np.ndarray:
    """Written anonymous memory that the system must not put into huge pages."""
    raw = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(raw, np.uint8)
    array[:] = 1
    return array


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux alone tells")
def test_the_share_of_huge_pages_is_what_the_system_gave() -> None:
    small = small_pages(8 * HUGE_PAGE)
    assert huge_share([small]) == 0
    if cpu.huge_pages()["enabled"] not in ("always", "madvise"):
        pytest.skip("transparent huge pages are switched off here")
    large = aligned_buffer(24 * HUGE_PAGE)
    large[:] = 1
    share = huge_share([large[5:], large[HUGE_PAGE:]])  # views, and one mapping twice
    assert share is not None and share > 0.8
    both = huge_share([small, large])
    assert both is not None and 0.5 * share < both < share


def test_where_the_system_does_not_tell_the_share_is_unknown(monkeypatch) -> None:
    assert huge_share([]) is None

    def refuse(*_: object) -> str:
        raise PermissionError

    monkeypatch.setattr(memory.Path, "read_text", refuse)
    assert huge_share([aligned_buffer(5)]) is None


@pytest.mark.parametrize("num_bytes", [0, 1, HUGE_PAGE, HUGE_PAGE + 1])
def test_buffers_begin_at_a_huge_page_and_hold_zeros(num_bytes: int) -> None:
    buffer = aligned_buffer(num_bytes)
    assert buffer.ctypes.data % HUGE_PAGE == 0 and buffer.shape == (num_bytes,)
    assert not buffer.any()


def resident_mb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def stays_of_freed() -> int:
    """MB that stay resident of 100 blocks of 1 MB that were freed."""
    before = resident_mb()
    blocks = [bytearray(1 << 20) for _ in range(100)]
    above = bytearray(1 << 18)
    blocks.clear()
    return resident_mb() - before if above else 0


def free_before_and_after_telling() -> None:
    """Print both, the first where glibc keeps what it may learn to keep."""
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(-1, 1 << 30) and mallopt(-3, 32 << 20)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    kept = stays_of_freed()
    assert give_back_freed()
    print(kept, stays_of_freed())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_goes_back_once_the_library_is_told() -> None:
    with forked(free_before_and_after_telling) as child:
        assert child.wait() == 0, child.err
        kept, after = map(int, child.out.split())
    assert after <= 10 < 80 <= kept
