"""A GGUF model, of one file or split: tensors by name, views of the mapped files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ktk.checkpoint.gguf.header import GgufTensor, Header, Metadata
from ktk.checkpoint.gguf.parts import directory_parts, file_parts
from ktk.checkpoint.gguf.types import why_refused
from ktk.checkpoint.safetensors import shown
from ktk.errors import CheckpointError
from ktk.experts.formats.decode import decode_rows
from ktk.paths import user_path


class GgufCheckpoint:
    """A GGUF model of one file or several parts; ``GgufCheckpoint.open`` makes one.

    path : as given. files : the parts' paths, in order. metadata : Mapping, see ``Metadata``; the
    parts' own ``split.`` keys are left out. tensors : Mapping name -> GgufTensor.
    Arrays of ``blocks`` keep the mapped file alive. May be used from several threads at once.
    """

    def __init__(self, path: Path, headers: list[Header]) -> None:
        self.path = path
        self.files = tuple(header.path for header in headers)
        self.metadata = Metadata()
        self._mapped = {header.path: header.file for header in headers}
        tensors: dict[str, GgufTensor] = {}
        first = headers[0].values.get("general.architecture")
        for header in headers:
            architecture = header.values.get("general.architecture", first)
            if architecture != first:
                raise CheckpointError(
                    f"{header.path}: general.architecture is {shown(architecture)}, in "
                    f"{headers[0].path.name} it is {shown(first)}: parts of different models"
                )
            self.metadata.add(header, skip_prefix="split.")
            for name, tensor in header.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"tensor {shown(name)} is in both {tensors[name].file} and {header.path}"
                    )
                tensors[name] = tensor
        said = headers[0].values.get("split.tensors.count")
        if said is not None and len(headers) > 1 and said != len(tensors):
            raise CheckpointError(
                f"{headers[0].path}: split.tensors.count is {shown(said)}, the parts hold "
                f"{len(tensors)} tensors: "
                "parts of different files; download them again"
            )
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufCheckpoint:
        """Open a .gguf file, any part of a split one, or a directory that holds one model.

        A directory is looked at without its sub-directories; vision projectors and adapters in it
        are left out.
        Raises CheckpointError, naming the parts that are missing, or the models if there are
        several.
        """
        path = user_path(path)
        try:
            is_directory = path.is_dir()
            exists = is_directory or path.exists() or path.is_symlink()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{path}: cannot be opened: {reason}") from None
        if is_directory:
            return cls(path, directory_parts(path))
        if not exists:
            raise CheckpointError(
                f"{path}: no such file or directory; give a .gguf file or a directory of one model"
            )
        return cls(path, file_parts(path))

    def info(self, name: str) -> GgufTensor:
        """``tensors[name]``; CheckpointError if there is none or its type cannot be used."""
        try:
            tensor = self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {shown(name)}") from None
        if not tensor.is_known:
            raise CheckpointError(
                f"{tensor.file}: tensor {shown(name)} (byte {tensor.begin}) is {tensor.type}: "
                f"{why_refused(tensor.type)}"
            )
        return tensor

    def blocks(self, name: str) -> np.ndarray:
        """uint8 (*shape[:-1], row_bytes), read-only:
        the tensor's blocks as they lie in the mapped file.
        """
        tensor = self.info(name)
        raw = self._mapped[tensor.file].data[tensor.begin : tensor.begin + tensor.num_bytes]
        return raw.reshape(*tensor.shape[:-1], tensor.row_bytes)

    def file_bytes(self, file: Path) -> np.ndarray:
        """uint8 (size,), read-only: the whole of a mapped part, for views over several tensors."""
        return self._mapped[file].data

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor, or its ``rows`` start to stop along dimension 0, dequantised.

        Returns float32, an array of the caller's own. Raises CheckpointError if the type is no
        weight format, ValueError if rows lie outside the tensor.
        """
        tensor = self.info(name)
        blocks = self.blocks(name)
        if rows is not None:
            start, stop = rows
            if not 0 <= start <= stop <= tensor.shape[0] or len(tensor.shape) < 2:
                raise ValueError(f"rows {start} to {stop} of {name}, whose shape is {tensor.shape}")
            blocks = blocks[start:stop]
        if not blocks.size:
            return np.empty((*blocks.shape[:-1], tensor.shape[-1]), np.float32)
        try:
            values = decode_rows(tensor.type, blocks)
        except ValueError as error:
            raise CheckpointError(f"{tensor.file}: tensor {shown(name)}: {error}") from None
        return np.array(values, np.float32)

    def will_need(self, name: str) -> None:
        """Ask the OS to read a tensor ahead; returns before it is there."""
        tensor = self.info(name)
        self._mapped[tensor.file].will_need(tensor.begin, tensor.num_bytes)

    def is_resident(self, name: str) -> bool:
        """Whether samples of a tensor's pages are in memory; True where the OS does not tell."""
        tensor = self.info(name)
        return self._mapped[tensor.file].is_resident(tensor.begin, tensor.num_bytes)
