"""Reads experts from a disk into the memory they are run from.

By pread from threads, which any system has. Where the file system takes O_DIRECT the bytes go past
the page cache; elsewhere the cache is told to forget them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ktk.checkpoint.packed import TENSOR, check_finite, open_layer
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.spec import MoESpec
from ktk.placement.store import ExpertStore

BLOCK = 4096  # O_DIRECT: offsets, sizes and addresses are multiples
TRIES = 4  # of a read that fails; a read that gives something is none
_AGAIN = (errno.EIO, errno.EAGAIN, errno.ENOMEM)  # may go by
# (descriptor, one buffer, offset) -> bytes read, as os.preadv
Preadv = Callable[[int, list[memoryview], int], int]


class ExpertReader(ABC):
    """Where experts come from. Safe to use from several threads.

    is_direct : whether reads go past the page cache.
    """

    is_direct: bool = False

    @abstractmethod
    def read(self, layer: int, expert: int, span: np.ndarray) -> None:
        """Fill ``span``, uint8 (the expert's bytes,), 4096-byte aligned.

        layer : among those the reader has, from 0. CheckpointError if it cannot be read; span then
        holds anything.
        """

    def files(self) -> list[tuple[int, int]] | None:
        """Of each layer the descriptor and byte from which its experts lie one behind the other, to
        be read by others as ``read`` does; None where ``read`` does more. They stay open until
        ``close``.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """No read runs or comes any more."""


class FilesReader(ExpertReader):
    """A reader of files that say what the experts are."""

    @abstractmethod
    def store(self, layer: int, activation: Activation | None = None) -> ExpertStore:
        """The layer's experts, none of them in memory yet. activation : in place of its spec's."""


class PackedReader(FilesReader):
    """Experts of a packed directory (``ktk convert``). Its files stay open, so that a directory
    that is replaced meanwhile does not matter.

    layers : numbers of the layers, in the order of ``read``. direct : use O_DIRECT where it works.
    preadv : the system call. Raises CheckpointError.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        layers: Sequence[int],
        *,
        direct: bool = True,
        preadv: Preadv = os.preadv,
    ) -> None:
        self.specs: list[MoESpec] = []
        self.is_direct = direct
        self._preadv = preadv
        self._layers = tuple(layers)
        self._stack = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)
        self._files: list[tuple[str, int, int]] = []  # path, descriptor, where experts begin
        try:
            for layer in layers:
                file, spec = open_layer(directory, layer)
                self._stack.callback(file.close)
                self.specs.append(spec)
                fd = self._reopened(file.fd) if direct else file.fd
                self._files.append((str(file.path), fd, file.tensors[TENSOR].begin))
        except BaseException:
            self.close()
            raise
        self._is_checked = [np.zeros(spec.num_experts, bool) for spec in self.specs]

    def _reopened(self, fd: int) -> int:
        """The same file for reads past the page cache, or fd where it takes none."""
        try:
            direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except (OSError, AttributeError):
            self.is_direct = False
            return fd
        self._stack.callback(os.close, direct)
        return direct

    def store(self, layer: int, activation: Activation | None = None) -> ExpertStore:
        spec = self.specs[layer]
        return ExpertStore.absent(replace(spec, activation=activation or spec.activation))

    def read(self, layer: int, expert: int, span: np.ndarray) -> None:
        path, fd, first = self._files[layer]
        begin, what = first + expert * len(span), f"{path}: expert {expert}"
        fill(fd, span, begin, what, self._preadv)
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, begin, len(span), os.POSIX_FADV_DONTNEED)
        if not self._is_checked[layer][expert]:
            named = f"{path}: layer {self._layers[layer]} expert {expert}"
            check_finite(self.specs[layer], span, named, begin)
            self._is_checked[layer][expert] = True

    def files(self) -> list[tuple[int, int]] | None:
        if not self.is_direct or self._preadv is not os.preadv:
            return None
        return [(fd, first) for _, fd, first in self._files]

    def close(self) -> None:
        self._finalizer()


def open_direct(file: Path) -> tuple[int, bool]:
    """A descriptor for reads past the page cache, and True; where the file system takes none, an
    ordinary one, and False. OSError if it cannot be opened.
    """
    plain = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(file, plain | os.O_DIRECT), True
    except (OSError, AttributeError):
        return os.open(file, plain), False


def fill(
    fd: int,
    span: np.ndarray,
    begin: int,
    what: str,
    preadv: Preadv = os.preadv,
    least: int | None = None,
) -> None:
    """Read all of ``span`` from byte ``begin`` of a file; errors that may go by are tried again.

    A read that stops short goes on at the last whole block, as O_DIRECT must. CheckpointError names
    ``what`` and the bytes. least : bytes that must be there; what the file has of the rest is read.
    """
    view, done, failed = memoryview(span), 0, 0  # type: ignore[arg-type]
    least = len(span) if least is None else least
    while done < least:
        at = done // BLOCK * BLOCK
        try:
            count = preadv(fd, [view[at:]], begin + at)
        except OSError as error:
            failed += 1
            if error.errno in _AGAIN and failed < TRIES:
                continue
            raise CheckpointError(
                f"{what}: reading bytes {begin + at} to {begin + len(span)}: {error.strerror}, "
                f"tried {failed} times"
            ) from None
        if at + count <= done:  # nothing new
            failed += 1
            if failed < TRIES and not _ends(fd, begin + done):
                continue
            raise CheckpointError(
                f"{what}: bytes {begin} to {begin + least} wanted, the file ends at "
                f"{begin + done}: it was truncated; convert or copy it again"
            )
        done = at + count


def _ends(fd: int, offset: int) -> bool:
    return os.fstat(fd).st_size <= offset
