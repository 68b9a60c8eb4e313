"""Reads experts of a GGUF file one by one, each from where its rows lie."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ktk.errors import BackendError, CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.machine.memory import aligned_buffer
from ktk.models.gguf.experts import ExpertRows, GgufExperts
from ktk.placement.residency.reader import BLOCK, FilesReader, Preadv, fill, open_direct
from ktk.placement.store import ExpertStore


class GgufReader(FilesReader):
    """Experts of a GGUF model: the rows of gate, up and down are gathered from their tensors. Rows
    begin anywhere, so that with O_DIRECT the blocks around them are read, and copied.

    layers, direct, preadv : as of ``PackedReader``. Raises CheckpointError for a file that is not
    the mapped one any more.
    """

    def __init__(
        self,
        experts: GgufExperts,
        layers: Sequence[int],
        *,
        direct: bool = True,
        preadv: Preadv = os.preadv,
    ) -> None:
        self.is_direct = direct
        self._experts, self._numbers, self._preadv = experts, tuple(layers), preadv
        self._stack = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)
        self._rows = [experts.rows(layer) for layer in layers]
        self._biases = [experts.biases(layer) for layer in layers]
        self._offsets: dict[int, dict[str, int]] = {}
        self._around = threading.local()  # a thread's memory for whole blocks
        try:
            self._files = {file: self._opened(file) for file in experts.checkpoint.files}
        except BaseException:
            self.close()
            raise

    def _opened(self, file: Path) -> int:
        try:
            fd, is_direct = open_direct(file) if self.is_direct else (os.open(file, _PLAIN), False)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be opened: {error.strerror}") from None
        self._stack.callback(os.close, fd)
        self.is_direct &= is_direct
        if os.fstat(fd).st_size != len(self._experts.checkpoint.file_bytes(file)):
            raise CheckpointError(f"{file}: was replaced while it was opened: open it again")
        return fd

    def store(self, layer: int, activation: Activation | None = None) -> ExpertStore:
        """BackendError for blocks that run only as a copy of other size."""
        spec = self._experts.spec(self._numbers[layer])
        spec = replace(spec, activation=activation or spec.activation)
        unused = {  # never touched
            name: aligned_buffer(rows.num_bytes).reshape(1, rows.out_features, -1)
            for name, rows in self._rows[layer].items()
        }
        matrices = {
            name: StoredMatrix(rows.format, rows.in_features, rows.out_features, unused[name])
            for name, rows in self._rows[layer].items()
        }
        biases = {f"{name}_bias": bias[:1] for name, bias in self._biases[layer].items()}
        order = np.full(spec.num_experts, -1)
        stored = StoredExperts(
            spec, matrices.get("gate"), matrices["up"], matrices["down"], **biases, order=order
        )
        store = ExpertStore(stored)
        for name, matrix in store.experts.matrices.items():
            if matrix.data is not unused[name]:
                raise BackendError(
                    f"layer {self._numbers[layer]}: {name} is {matrices[name].format.name} "
                    f"({matrices[name].out_features}, {matrices[name].in_features}), which runs "
                    "only as a copy in memory: leave the limit of expert memory out, or run "
                    "`ktk convert` on the file"
                )
        self._offsets[layer] = store.offsets
        return store

    def read(self, layer: int, expert: int, span: np.ndarray) -> None:
        what = f"layer {self._numbers[layer]} expert {expert}"
        offsets = self._offsets[layer]
        for name, rows in self._rows[layer].items():
            part = span[offsets[name] : offsets[name] + rows.num_bytes]
            self._read_rows(rows, expert, part, f"{what}: {name}")
        for name, bias in self._biases[layer].items():
            raw = bias[expert].view(np.uint8)
            first = offsets[f"{name}_bias"]
            span[first : first + raw.size] = raw

    def _read_rows(self, rows: ExpertRows, expert: int, part: np.ndarray, what: str) -> None:
        file, begin = rows.places[expert]
        fd, what = self._files[file], f"{file}: {what}"
        if not self.is_direct:
            fill(fd, part, begin, what, self._preadv)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, begin, len(part), os.POSIX_FADV_DONTNEED)
            return
        skip = begin % BLOCK
        size = -(-(skip + len(part)) // BLOCK) * BLOCK
        around = getattr(self._around, "memory", None)
        if around is None or len(around) < size:
            around = self._around.memory = aligned_buffer(size)
        fill(fd, around[:size], begin - skip, what, self._preadv, least=skip + len(part))
        part[:] = around[skip : skip + len(part)]

    def close(self) -> None:
        self._finalizer()


_PLAIN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
