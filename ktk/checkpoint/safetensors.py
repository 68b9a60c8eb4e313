"""Safetensors files and checkpoints of them, read as hostile bytes.

Headers are read when a checkpoint is opened, tensors on demand with ``preadv``: a file that is cut
off while it is read gives a CheckpointError, where a memory map would give SIGBUS, and the page
cache stays out of this process's memory. Every offset is checked against the file before anything
is allocated for it.
Source: the safetensors format description (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import functools
import json
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np

from ktk.errors import CheckpointError
from ktk.paths import user_path

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_JSON = 100_000_000  # bytes of config.json or an index
MAX_DIMENSIONS = 32
READ_STEP = 1 << 30  # Linux moves at most 2 GiB - 4 KiB per call

# Format name -> NumPy dtype of the raw bits. Floats NumPy lacks come as unsigned integers of their
# width.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: ``dtype`` as the format names it,
    bytes ``begin`` to ``end`` of ``file``.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class _Malformed(Exception):
    """What is wrong inside a header; the caller adds the file."""


def strict_json(raw: bytes) -> Any:
    """Parse JSON from a stranger; raises ``ValueError`` on duplicate keys and on nesting too
    deep to parse.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"key {shown(key)} occurs twice")
                seen.add(key)
        return fields

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of at most 100 MB; CheckpointError otherwise."""
    fd, size = open_regular(path)
    try:
        if size > MAX_JSON:
            raise CheckpointError(f"{path}: {size} bytes: a JSON file here has at most {MAX_JSON}")
        raw = bytearray(size)
        read_into(fd, memoryview(raw), 0, str(path))
    finally:
        os.close(fd)
    try:
        value = strict_json(bytes(raw))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}: must be an object")
    return value


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading: (descriptor, size in bytes).

    CheckpointError says why not.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not hang; it means nothing for a regular file.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        if os.path.islink(path) and not os.path.exists(path):
            target = os.readlink(path)
            raise CheckpointError(
                f"{path}: symbolic link to {target}, which does not exist; download the "
                "checkpoint again"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd, info.st_size


def read_into(fd: int, view: memoryview, offset: int, what: str) -> None:
    """Fill ``view`` from byte ``offset`` on; CheckpointError if the file ends before."""
    done, total = 0, len(view)
    while done < total:
        try:
            count = os.preadv(fd, [view[done : done + READ_STEP]], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"{what}: reading bytes {offset + done} to {offset + total}: {error.strerror}"
            ) from None
        if count == 0:
            raise CheckpointError(
                f"{what}: bytes {offset} to {offset + total} wanted, the file ends at "
                f"{offset + done}: "
                "it was truncated; copy or download it again"
            )
        done += count


class SafetensorsFile:
    """One open file and its checked header.

    tensors : name -> TensorInfo, in the header's order. metadata : its ``__metadata__``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd, self.size = open_regular(path)
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        try:
            self.metadata, self.tensors = self._read_header()
        except _Malformed as error:
            self.close()
            raise CheckpointError(f"{path}: {error}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._finalizer()

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        if self.size < 8:
            raise _Malformed(
                f"bytes 0 to 8 are the header length, the file has {self.size}: not safetensors"
            )
        raw_length = bytearray(8)
        read_into(self.fd, memoryview(raw_length), 0, str(self.path))
        length = int.from_bytes(raw_length, "little")
        if length > MAX_HEADER:
            raise _Malformed(
                f"header of {length} bytes: at most {MAX_HEADER}; is this a safetensors file?"
            )
        if length == 0:
            raise _Malformed("header of 0 bytes: must hold a JSON object")
        if 8 + length > self.size:
            raise _Malformed(
                f"header is bytes 8 to {8 + length}, the file ends at {self.size}: truncated or "
                "not safetensors"
            )
        raw = bytearray(length)
        read_into(self.fd, memoryview(raw), 8, str(self.path))
        if raw[:1] != b"{":
            raise _Malformed(f"header begins with {bytes(raw[:1])!r}: must be a JSON object")
        try:
            header = strict_json(bytes(raw))
        except ValueError as error:
            raise _Malformed(f"header (bytes 8 to {8 + length}) is not JSON: {error}") from None
        if not isinstance(header, dict):
            raise _Malformed(f"header is a JSON {type(header).__name__}: must be an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise _Malformed("__metadata__ must map strings to strings")
        tensors = {name: self._tensor(name, entry, 8 + length) for name, entry in header.items()}
        self._check_cover(tensors, 8 + length)
        return metadata, tensors

    def _tensor(self, name: str, entry: Any, data: int) -> TensorInfo:
        """Check one header entry; ``data`` is where the tensors begin in the file."""
        where = f"tensor {shown(name)}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _Malformed(f"{where}: entry must hold exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _Malformed(
                f"{where}: dtype {shown(dtype)} is not supported; known: {', '.join(DTYPES)}"
            )
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
            or not all(map(_is_size, shape))
        ):
            raise _Malformed(
                f"{where}: shape {shown(shape)}: must be at most {MAX_DIMENSIONS} ints of 0 to "
                "2**63-1"
            )
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            raise _Malformed(
                f"{where}: data_offsets {shown(offsets)}: must be two ints of 0 to 2**63-1"
            )
        begin, end = data + offsets[0], data + offsets[1]
        if begin > end:
            raise _Malformed(f"{where}: bytes {begin} to {end}: begin lies behind end")
        if end > self.size:
            raise _Malformed(
                f"{where}: bytes {begin} to {end}, the file ends at {self.size}: truncated or "
                "corrupt"
            )
        elements = nonzero = 1
        for size in shape:
            elements *= size
            nonzero *= size or 1
            if nonzero >= 1 << 63:
                raise _Malformed(f"{where}: shape {shown(shape)} has 2**63 elements or more")
        wanted = elements * DTYPES[dtype].itemsize
        if wanted != end - begin:
            raise _Malformed(
                f"{where}: bytes {begin} to {end} are {end - begin}, {dtype} {shown(shape)} needs "
                f"{wanted}"
            )
        return TensorInfo(dtype, tuple(shape), self.path, begin, end)

    def _check_cover(self, tensors: dict[str, TensorInfo], data: int) -> None:
        """Tensors must cover the data without overlap or hole, as the format says."""
        position, before = data, "the header"
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != position:
                fault = "overlaps" if info.begin < position else "leaves a hole behind"
                raise _Malformed(
                    f"tensor {shown(name)}: bytes {info.begin} to {info.end} {fault} {before}, "
                    f"which ends at {position}"
                )
            position, before = info.end, f"tensor {shown(name)}"
        if position != self.size:
            raise _Malformed(
                f"{before} ends at byte {position}, the file at {self.size}: bytes nothing names"
            )

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """Fill ``view`` from byte ``offset`` of tensor ``name`` on."""
        info = self.tensors[name]
        if offset < 0 or offset + len(view) > info.nbytes:
            raise ValueError(
                f"bytes {offset} to {offset + len(view)} of {name}, which has {info.nbytes}"
            )
        read_into(self.fd, view, info.begin + offset, f"{self.path}: tensor {shown(name)}")


class Checkpoint:
    """Tensors of a directory or of one file, by name; ``Checkpoint.open`` makes one.

    tensors : Mapping name -> TensorInfo. files : the SafetensorsFile read. config : config.json as
    a dict, read on first use. A Checkpoint may be read from several threads at once.
    """

    def __init__(
        self, path: Path, files: list[SafetensorsFile], names: Mapping[str, Path] | None
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self._file_of:
                    other = self._file_of[name].path
                    raise CheckpointError(
                        f"tensor {shown(name)} is in both {other} and {file.path}"
                    )
                self._file_of[name] = file
        listed = (
            self._file_of if names is None else names
        )  # what the index leaves out is not the model's
        for name in listed:
            if names is not None and (
                name not in self._file_of or self._file_of[name].path != names[name]
            ):
                raise CheckpointError(
                    f"{names[name]}: lacks tensor {shown(name)}, which the index places there"
                )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: file.tensors[name] for name, file in self._file_of.items() if name in listed}
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a Hugging Face directory, or one .safetensors file.

        A directory is read by its model.safetensors.index.json, else as model.safetensors, else by
        the only other index in it, else as all its .safetensors files. Symbolic links are followed,
        as the hub's cache needs. Raises CheckpointError.
        """
        path = user_path(path)
        names: dict[str, Path] | None = None
        if path.is_dir():
            paths, names = _directory_files(path)
        elif path.exists() or path.is_symlink():
            if path.suffix != ".safetensors" and path.is_file():
                raise CheckpointError(f"{path}: must be a directory or a .safetensors file")
            paths = [path]
        else:
            raise CheckpointError(
                f"{path}: no such file or directory; give a Hugging Face directory or a "
                ".safetensors file"
            )
        files: list[SafetensorsFile] = []
        try:
            for file in paths:
                files.append(SafetensorsFile(file))
            return cls(path, files, names)
        except BaseException:
            for opened in files:
                opened.close()
            raise

    @property
    def directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json; CheckpointError if it is missing or not a JSON object."""
        path = self.directory / "config.json"
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(
                f"{path}: missing; it tells the shapes and the activation of the experts"
            )
        return read_json_object(path)

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self, name: str) -> TensorInfo:
        """``tensors[name]``, as CheckpointError if there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {shown(name)}") from None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The raw bits of a tensor, or of its ``rows`` start to stop along dimension 0.

        Returns an array of the caller's own: F32, F16, integers as such, BF16 as uint16, fp8 and
        BOOL as uint8, (stop - start, ...). Raises CheckpointError, ValueError if rows lie outside
        the tensor.
        """
        info = self.info(name)
        shape, offset = info.shape, 0
        if rows is not None:
            start, stop = rows
            if not shape or not 0 <= start <= stop <= shape[0]:
                raise ValueError(f"rows {start} to {stop} of {name}, whose shape is {shape}")
            row_bytes = info.nbytes // shape[0] if shape[0] else 0
            shape, offset = (stop - start, *shape[1:]), start * row_bytes
        array = np.empty(shape, DTYPES[info.dtype])
        if array.nbytes:
            self._file_of[name].read_into(name, array.reshape(-1).view(np.uint8).data, offset)
        return array

    def chunks(self, name: str, chunk_bytes: int = 8 << 20) -> Iterator[memoryview]:
        """The tensor's bytes in order; each piece is valid until the next is asked for."""
        info = self.info(name)
        buffer = memoryview(bytearray(min(chunk_bytes, info.nbytes)))
        for offset in range(0, info.nbytes, chunk_bytes):
            piece = buffer[: min(chunk_bytes, info.nbytes - offset)]
            self._file_of[name].read_into(name, piece, offset)
            yield piece


def _directory_files(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files of a checkpoint directory, and where its index places each tensor if it has one."""
    index = path / "model.safetensors.index.json"
    if not _present(index):
        single = path / "model.safetensors"
        if _present(single):
            return [single], None
        indexes = sorted(path.glob("*.safetensors.index.json"))
        if len(indexes) != 1:
            # Layers that cpu_save wrote beside the checkpoint are not part of it.
            files = [
                f
                for f in sorted(path.glob("*.safetensors"))
                if not f.name.startswith("ktk-experts-")
            ]
            if not files:
                raise CheckpointError(
                    f"{path}: holds no .safetensors file; give a checkpoint directory"
                )
            return files, None
        index = indexes[0]
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    names: dict[str, Path] = {}
    for name, file in weight_map.items():
        parts = PurePosixPath(file)
        if (
            parts.is_absolute()
            or ".." in parts.parts
            or not parts.parts
            or "\0" in file
            or "\\" in file
        ):
            raise CheckpointError(
                f"{index}: tensor {shown(name)} is placed in {shown(file)}: must be a file inside "
                "the directory"
            )
        names[name] = path / file
    files = sorted(set(names.values()))
    for needed in files:
        if not _present(needed):
            first = next(name for name, file in names.items() if file == needed)
            raise CheckpointError(
                f"{needed}: missing; {index.name} places {shown(first)} there; finish the download"
            )
    return files, names


def _present(path: Path) -> bool:
    """Exists, or is a link to something missing, which opening will name."""
    return path.exists() or path.is_symlink()


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def shown(value: object) -> str:
    """A stranger's value, short and on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"
    try:
        text = repr(value[:40] if isinstance(value, list) else value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 200 else f"{text[:197]}..."
