"""The file of pages: elements of one size, the first of which says whose file it is.

A page takes as many elements as it needs, in as few runs as there are. Which of them are taken is
known to the metadata alone; this file has none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ktk.checkpoint.packed import replacing, write_all
from ktk.errors import CheckpointError
from ktk.kv.prefix.config import BLOCK
from ktk.kv.prefix.hashing import DIGEST_BYTES, digest
from ktk.placement.residency.reader import fill

MAGIC, VERSION = b"ktk-kv\0\0", 1
_HEAD = struct.Struct("<8sII16s")
Runs = tuple[tuple[int, int], ...]  # (first element, number of elements)


class ElementFile:
    """Reads and writes runs of elements, past the page cache where the file system can.

    Reads may run in several threads, one of which may write. origin : the store's own 16 bytes.
    """

    def __init__(self, path: Path, element_bytes: int) -> None:
        """Raises CheckpointError if the file is not one, or of another size of elements."""
        self.path, self.element_bytes = path, element_bytes
        self._stack = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)
        self.fd, self.is_direct = self._open()
        try:
            self.origin = self._read_head()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, element_bytes: int) -> None:
        """A new file without pages, complete or not at all."""
        head = _HEAD.pack(MAGIC, VERSION, element_bytes, os.urandom(16))
        with replacing(path) as file:
            write_all(file, (head + digest(head)).ljust(element_bytes, b"\0"))

    def _open(self) -> tuple[int, bool]:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            fd, is_direct = os.open(self.path, flags | os.O_DIRECT), True
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            fd, is_direct = os.open(self.path, flags), False
        self._stack.callback(os.close, fd)
        return fd, is_direct

    def _read_head(self) -> bytes:
        memory = np.empty(2 * BLOCK, np.uint8)
        start = -memory.ctypes.data % BLOCK
        first = memory[start : start + BLOCK]
        fill(self.fd, first, 0, f"{self.path}: its head")
        size = _HEAD.size
        head, said = first[:size].tobytes(), first[size : size + DIGEST_BYTES].tobytes()
        magic, version, element_bytes, origin = _HEAD.unpack(head)
        if magic != MAGIC or said != digest(head):
            raise CheckpointError(f"{self.path}: no file of KV pages: delete the store's directory")
        if version != VERSION:
            raise CheckpointError(
                f"{self.path}: version {version}, this ktk reads {VERSION}: delete the store's "
                "directory, or give another"
            )
        if element_bytes != self.element_bytes:
            raise CheckpointError(
                f"{self.path}: elements of {element_bytes} bytes, element_bytes="
                f"{self.element_bytes} wanted: give that, or another directory"
            )
        return bytes(origin)

    @property
    def num_elements(self) -> int:
        """Whole ones that the file has, its head among them."""
        return os.fstat(self.fd).st_size // self.element_bytes

    def write(self, runs: Runs, frame: np.ndarray) -> None:
        """Write a frame, uint8 (bytes of the runs,). Raises OSError."""
        done = 0
        for first, count in runs:
            end = done + count * self.element_bytes
            at = first * self.element_bytes
            while done < end:
                wrote = os.pwrite(self.fd, frame[done:end].data, at)
                wrote -= wrote % BLOCK if self.is_direct else 0
                if not wrote:
                    raise OSError(errno.ENOSPC, f"{self.path}: bytes {at} on: nothing was written")
                done, at = done + wrote, at + wrote

    def sync(self) -> None:
        """What was written survives a power cut."""
        getattr(os, "fdatasync", os.fsync)(self.fd)

    def read(self, runs: Runs, frame: np.ndarray) -> None:
        """Fill a frame, uint8 (bytes of the runs,), aligned to BLOCK. Raises CheckpointError."""
        done = 0
        for first, count in runs:
            end = done + count * self.element_bytes
            fill(self.fd, frame[done:end], first * self.element_bytes, str(self.path))
            if not self.is_direct and hasattr(os, "posix_fadvise"):
                size = count * self.element_bytes
                os.posix_fadvise(self.fd, first * self.element_bytes, size, os.POSIX_FADV_DONTNEED)
            done = end

    def shrink(self, num_elements: int) -> None:
        """Leave no more than so many to the file."""
        if self.num_elements > num_elements:
            os.ftruncate(self.fd, num_elements * self.element_bytes)

    def close(self) -> None:
        self._finalizer()


class FreeElements:
    """Which elements up to a number are free: runs, ascending, never two that touch."""

    def __init__(self, limit: int, taken: Iterable[tuple[int, int]]) -> None:
        """limit : elements that the file may have. taken : runs that do not overlap."""
        self._limit = limit
        self._runs: list[tuple[int, int]] = []
        end = 0
        for first, count in sorted([*taken, (limit, 0)]):
            if first > end:
                self._runs.append((end, min(first, limit) - end))
            end = max(end, first + count)

    @property
    def count(self) -> int:
        return sum(count for _, count in self._runs)

    @property
    def end(self) -> int:
        """One behind the last element that is taken."""
        is_open = bool(self._runs) and sum(self._runs[-1]) == self._limit
        return self._runs[-1][0] if is_open else self._limit

    def take(self, count: int) -> Runs | None:
        """The first run that is large enough, else the largest ones; None if too few are free."""
        if count > self.count:
            return None
        fitting = [run for run in self._runs if run[1] >= count]
        found, wanted = list[tuple[int, int]](), count
        for first, length in fitting[:1] or sorted(self._runs, key=lambda run: -run[1]):
            if not wanted:
                break
            part = min(wanted, length)
            found.append((first, part))
            at = self._runs.index((first, length))
            self._runs[at : at + 1] = [(first + part, length - part)] if length > part else []
            wanted -= part
        return tuple(found)

    def give_back(self, runs: Runs) -> None:
        merged: list[tuple[int, int]] = []
        for first, count in sorted([*self._runs, *runs]):
            if merged and sum(merged[-1]) == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                merged.append((first, count))
        self._runs = merged
