"""Importance matrices of llama.cpp: mean squares of what comes to each column of a matrix.

Two kinds of files are read and written, and read as hostile: GGUF, of sums and counts of tokens by
expert, and the older .dat, of means times a number of calls. Source: llama.cpp's tools/imatrix.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.mapping import MappedFile
from ktk.checkpoint.packed import replacing, write_all
from ktk.checkpoint.safetensors import shown
from ktk.errors import CheckpointError
from ktk.paths import user_path

F = np.float32
MAX_NAME = 1024  # bytes
SUMS, COUNTS = ".in_sum2", ".counts"
_INT = struct.Struct("<i")


@dataclass(frozen=True)
class Importance:
    """Of one tensor. mean_squares : float32 (matrices, columns), finite, at least 0. counts :
    float32 (matrices,), tokens that each saw; a .dat file has calls in their place.
    """

    mean_squares: np.ndarray
    counts: np.ndarray

    def by_matrix(self, matrices: int) -> Importance:
        """The same of so many matrices: .dat files say theirs in one row; one row counts for all.

        Raises ValueError where columns do not come out even.
        """
        have, columns = self.mean_squares.shape
        if have == matrices:
            return self
        if have == 1 and columns % matrices == 0:
            counts = np.repeat(self.counts, matrices)
            return Importance(self.mean_squares.reshape(matrices, -1), counts)
        raise ValueError(f"{have} x {columns} numbers: must be of {matrices} matrices")


@dataclass(frozen=True)
class Imatrix:
    """entries : by the name of the tensor, as GGUF files have it. chunk_size : tokens that were
    read at a time. dataset : a name of the text.
    """

    entries: Mapping[str, Importance]
    chunk_size: int = 512
    dataset: str = ""


def read_imatrix(path: Path) -> Imatrix:
    """Either kind of file. Raises CheckpointError, with the byte or tensor, for what is neither."""
    path = user_path(path)
    file = MappedFile(path)
    if bytes(file.data[:4]) == b"GGUF":
        return _read_gguf(path)
    return _Dat(file).read()


def _read_gguf(path: Path) -> Imatrix:
    checkpoint = GgufCheckpoint.open(path)
    kind = checkpoint.metadata.get("general.type")
    if kind != "imatrix":
        raise CheckpointError(f"{path}: general.type is {shown(kind)}: must be 'imatrix'")
    entries = {}
    for name in sorted(checkpoint.tensors):
        if not name.endswith(SUMS):
            continue
        tensor = name.removesuffix(SUMS)
        if tensor + COUNTS not in checkpoint.tensors:
            raise CheckpointError(f"{path}: {shown(name)} has no {shown(tensor + COUNTS)}")
        for part in (name, tensor + COUNTS):
            if checkpoint.tensors[part].type != "F32":
                raise CheckpointError(
                    f"{path}: tensor {shown(part)} is {checkpoint.tensors[part].type}: must be F32"
                )
        sums = checkpoint.read(name)
        sums = sums.reshape(-1, sums.shape[-1])
        counts = checkpoint.read(tensor + COUNTS).ravel()
        if len(counts) != len(sums) or not sums.size:
            raise CheckpointError(
                f"{path}: {shown(name)} has {len(sums)} matrices, {len(counts)} counts"
            )
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise CheckpointError(f"{path}: {shown(tensor + COUNTS)} holds what is no count")
        means = sums / np.maximum(counts, 1)[:, None]
        entries[tensor] = Importance(_checked(means, f"{path}: {shown(name)}"), counts)
    if not entries:
        raise CheckpointError(f"{path}: holds no tensor that ends in {SUMS}")
    size = checkpoint.metadata.get("imatrix.chunk_size")
    datasets = checkpoint.metadata.get("imatrix.datasets")
    is_named = isinstance(datasets, list) and datasets and isinstance(datasets[-1], str)
    return Imatrix(
        entries,
        size if type(size) is int and size > 0 else 512,
        datasets[-1] if is_named and datasets is not None else "",
    )


class _Dat:
    """A .dat file, read from its start."""

    def __init__(self, file: MappedFile) -> None:
        self.path, self.data, self.at = file.path, file.data, 0

    def read(self) -> Imatrix:
        count = self._int("the number of entries")
        if not 0 < count <= len(self.data) // 12:
            raise CheckpointError(
                f"{self.path}: byte 0: {count} entries in {len(self.data)} bytes: is no importance "
                "matrix of llama.cpp's"
            )
        entries: dict[str, Importance] = {}
        for _ in range(count):
            begin = self.at
            name = self._text("a name", MAX_NAME)
            calls = self._int(f"calls of {shown(name)}")
            columns = self._int(f"columns of {shown(name)}")
            if calls < 1 or columns < 1 or name in entries:
                twice = ", a second time" if name in entries else ""
                raise CheckpointError(
                    f"{self.path}: byte {begin}: {shown(name)}: {calls} calls, {columns} columns"
                    f"{twice}: must be positive, and once"
                )
            values = self._take(4 * columns, f"the numbers of {shown(name)}").view("<f4")
            means = values.astype(F)[None] / F(calls)
            checked = _checked(means, f"{self.path}: byte {begin}: {shown(name)}")
            entries[name] = Importance(checked, np.array([calls], F))
        if self.at == len(self.data):  # files of the first months end here
            return Imatrix(entries)
        self._int("the last call")
        dataset = self._text("the dataset", 1 << 16) if self.at < len(self.data) else ""
        return Imatrix(entries, dataset=dataset)

    def _take(self, size: int, what: str) -> np.ndarray:
        if size > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path}: byte {self.at}: {what} needs {size} bytes, the file ends at "
                f"{len(self.data)}: truncated, or no importance matrix"
            )
        self.at += size
        return np.array(self.data[self.at - size : self.at])

    def _int(self, what: str) -> int:
        value: int = _INT.unpack(self._take(4, what).tobytes())[0]
        return value

    def _text(self, what: str, limit: int) -> str:
        size = self._int(f"the length of {what}")
        if not 0 <= size <= limit:
            raise CheckpointError(
                f"{self.path}: byte {self.at - 4}: {what} of {size} bytes: must be 0 to {limit}"
            )
        return self._take(size, what).tobytes().decode("utf-8", "replace")


def _checked(means: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(means).all() or (means < 0).any():
        raise CheckpointError(f"{where}: mean squares must be finite and not negative")
    return means


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """A .dat file if the name ends so, else GGUF. It appears complete or not at all."""
    path = user_path(path)
    if path.name.lower().endswith(".dat"):
        with replacing(path) as file:
            for piece in _dat_pieces(imatrix):
                write_all(file, piece)
        return
    with replacing(path) as file:
        writer = gguf.GGUFWriter(None, "imatrix")
        del writer.kv_data[0]["general.architecture"]  # which llama.cpp's have none of
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [imatrix.dataset])
        chunks = max(float(e.counts.max()) for e in imatrix.entries.values())
        writer.add_uint32("imatrix.chunk_count", -int(-chunks // imatrix.chunk_size))
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name, entry in sorted(imatrix.entries.items()):
            sums = entry.mean_squares * entry.counts[:, None]
            writer.add_tensor(name + SUMS, np.ascontiguousarray(sums, F))
            writer.add_tensor(name + COUNTS, np.ascontiguousarray(entry.counts[:, None], F))
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _dat_pieces(imatrix: Imatrix) -> list[bytes]:
    """As llama.cpp's: what no token came to is 1."""
    pieces = [_INT.pack(len(imatrix.entries))]
    most = 0
    for name, entry in sorted(imatrix.entries.items()):
        calls = max(1, -int(-float(entry.counts.max()) // imatrix.chunk_size))
        most = max(most, calls)
        values = np.where(entry.counts[:, None] > 0, entry.mean_squares, F(1)) * F(calls)
        said = name.encode()
        pieces += [_INT.pack(len(said)), said, _INT.pack(calls), _INT.pack(values.size)]
        pieces.append(values.astype("<f4").tobytes())
    dataset = imatrix.dataset.encode()
    return [*pieces, _INT.pack(most), _INT.pack(len(dataset)), dataset]
