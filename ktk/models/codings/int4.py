"""4-bit weights that other tools packed into int32 words, eight codes to a word, the first in the
lowest bits.

A row of ``INT4_CODINGS`` says what a tool's tensors are called and how they lie. Symmetric codes
come out as they are (``CodedMatrix``); asymmetric ones, and those whose columns were reordered, as
float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint, TensorInfo
from ktk.errors import CheckpointError
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import bf16_to_f32
from ktk.experts.stored import CodedMatrix
from ktk.models.config import Config

PER_WORD = 8
SYMMETRIC_ZERO = 8


@dataclass(frozen=True)
class Int4Settings:
    """What a config's quantization_config says, as far as it matters.

    checkpoint_format : of GPTQ.
    """

    quant_method: str
    bits: int
    checkpoint_format: str

    @classmethod
    def of(cls, config: Config) -> Int4Settings:
        """Raises CheckpointError."""
        said = config.quantization
        bits = said.get("bits", 4)
        if type(bits) is not int:
            raise CheckpointError(
                f"{config.where}: quantization_config.bits={bits!r}: must be an int"
            )
        return cls(
            str(said.get("quant_method", "")), bits, str(said.get("checkpoint_format", "gptq"))
        )


class Int4Matrix(ABC):
    """One matrix of a checkpoint, (out_features, in_features).

    name : of the tensor that stands for it. tensors : suffix after the module's name -> name of the
        tensor.
    num_groups : scales of a row.
    """

    dtype = "int4"

    def __init__(
        self, name: str, tensors: dict[str, str], shape: tuple[int, int], num_groups: int
    ) -> None:
        self.name, self.tensors, self.shape, self.num_groups = name, tensors, shape, num_groups
        self.group_size = shape[1] // num_groups

    @abstractmethod
    def codes(self, checkpoint: Checkpoint) -> np.ndarray:
        """uint8 (out_features, in_features), 0 to 15."""

    @abstractmethod
    def scales(self, checkpoint: Checkpoint) -> np.ndarray:
        """float32 (out_features, groups)."""

    @abstractmethod
    def zero_points(self, checkpoint: Checkpoint) -> np.ndarray | None:
        """int (out_features, groups); None where all are 8."""

    def groups(self, checkpoint: Checkpoint) -> np.ndarray:
        """int (in_features,): the group of each column."""
        return np.arange(self.shape[1]) // self.group_size

    def read_coded(self, checkpoint: Checkpoint) -> CodedMatrix | None:
        """The codes as they are; None where they are not symmetric or their groups not in order."""
        groups = self.groups(checkpoint)
        if not np.array_equal(groups, Int4Matrix.groups(self, checkpoint)):
            return None
        zeros = self.zero_points(checkpoint)
        if zeros is not None and (zeros != SYMMETRIC_ZERO).any():
            return None
        codes = self.codes(checkpoint).astype(np.int8) - np.int8(SYMMETRIC_ZERO)
        scales = self.scales(checkpoint)
        block = (1, codes.shape[1] // scales.shape[1])
        return CodedMatrix(codes, scales, PANELS["int4"], block)

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """float32 (out_features, in_features)."""
        groups, scales = self.groups(checkpoint), self.scales(checkpoint)
        zeros = self.zero_points(checkpoint)
        codes = self.codes(checkpoint).astype(np.float32)
        if zeros is None:
            return (codes - np.float32(SYMMETRIC_ZERO)) * scales[:, groups]
        return (codes - zeros.astype(np.float32)[:, groups]) * scales[:, groups]

    def bands(self, checkpoint: Checkpoint, weights: int) -> Iterator[np.ndarray]:
        """All of it at once: along which dimension codes are packed differs."""
        yield self.read(checkpoint)


class Int4Coding(ABC):
    """One tool's way. weight : the suffix that stands for the weight. suffixes :
    all it writes beside.
    """

    name: str
    quant_method: str
    weight: str
    suffixes: frozenset[str]

    @abstractmethod
    def matrix(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: Int4Settings
    ) -> Int4Matrix:
        """Check one module's tensors, by suffix. Raises CheckpointError."""

    def open(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: Int4Settings
    ) -> Int4Matrix:
        """``matrix``, after what all have in common."""
        info = checkpoint.info(tensors[self.weight])
        where = f"{info.file}: tensor {tensors[self.weight]!r} (bytes {info.begin} to {info.end})"
        if settings.quant_method != self.quant_method:
            raise CheckpointError(
                f"{where} is named as {self.name} names it, but quantization_config.quant_method "
                f"is {settings.quant_method!r}: must be {self.quant_method!r}; convert from bf16 "
                "or fp8"
            )
        if settings.bits != 4:
            raise CheckpointError(
                f"{where}: {self.name} of {settings.bits} bits is not read: must be 4"
            )
        if info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(
                f"{where} is {info.dtype} {info.shape}: must be I32, two-dimensional"
            )
        return self.matrix(checkpoint, tensors, settings)


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 (rows, words) to codes, uint8 (rows, 8 * words), 0 to 15."""
    pairs = np.ascontiguousarray(words).view(np.uint8)  # two codes a byte, the lower first
    return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(words), -1)


def check(info: TensorInfo, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if info.dtype not in dtypes or info.shape != shape:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}) is {info.dtype} "
            f"{info.shape}: must be {' or '.join(dtypes)} {shape}"
        )


def read_floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Scales as float32; CheckpointError if one is NaN or infinite."""
    raw, info = checkpoint.read(name), checkpoint.info(name)
    values = bf16_to_f32(raw) if info.dtype == "BF16" else raw.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}): holds NaN or "
            "infinite scales"
        )
    return values
