"""Quantised modules whose tensors have names of their own: by other tools' codings.

A row of ``MODULE_CODINGS`` says which tensors a module of its has, and opens them as a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint, TensorInfo
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import bf16_to_f32
from ktk.experts.stored import CodedMatrix
from ktk.models.config import Config


@dataclass(frozen=True)
class QuantSettings:
    """What a config's quantization_config says, as far as it matters.

    checkpoint_format : of GPTQ. version : of AWQ.
    """

    quant_method: str
    bits: int
    checkpoint_format: str
    version: str

    @classmethod
    def of(cls, config: Config) -> QuantSettings:
        """Raises CheckpointError."""
        said = config.quantization
        bits = said.get("bits", 4)
        if type(bits) is not int:
            raise CheckpointError(
                f"{config.where}: quantization_config.bits={bits!r}: must be an int"
            )
        return cls(
            str(said.get("quant_method", "")),
            bits,
            str(said.get("checkpoint_format", "gptq")),
            str(said.get("version", "gemm")).lower(),
        )


class ModuleMatrix(ABC):
    """One matrix of a checkpoint, (out_features, in_features).

    dtype : one of SOURCE_DTYPES. name : of the tensor that stands for it. tensors : suffix after
    the module's name -> name of the tensor.
    """

    dtype: str

    def __init__(self, name: str, tensors: dict[str, str], shape: tuple[int, int]) -> None:
        self.name, self.tensors, self.shape = name, tensors, shape

    @abstractmethod
    def read_coded(self, checkpoint: Checkpoint) -> CodedMatrix | None:
        """The codes as they are; None where no format of panels has such."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """float32 (out_features, in_features)."""

    @abstractmethod
    def panel_format(self, checkpoint: Checkpoint) -> tuple[str, int] | None:
        """The format of panels that keeps its codes, and the group size; None if there is none."""

    def bands(self, checkpoint: Checkpoint, weights: int) -> Iterator[np.ndarray]:
        """All of it at once: along which dimension codes are packed differs."""
        yield self.read(checkpoint)


class ModuleCoding(ABC):
    """One tool's way. dtype : of its matrices. quant_methods : as configs name it. weight : the
    suffix that stands for the weight. suffixes : all it writes beside. marks : those by which it is
    told from others.
    """

    name: str
    dtype: str
    quant_methods: tuple[str, ...]
    weight: str
    suffixes: frozenset[str]
    marks: frozenset[str]

    def is_named(self, suffixes: Collection[str]) -> bool:
        """Whether a module with these tensors may be one of its."""
        return self.marks <= set(suffixes)

    @abstractmethod
    def matrix(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: QuantSettings
    ) -> ModuleMatrix:
        """Check one module's tensors, by suffix. Raises CheckpointError."""

    def open(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: QuantSettings
    ) -> ModuleMatrix:
        """``matrix``, after what all have in common."""
        info = checkpoint.info(tensors[self.weight])
        where = f"{info.file}: tensor {tensors[self.weight]!r} (bytes {info.begin} to {info.end})"
        allowed = " or ".join(map(repr, self.quant_methods))
        if settings.quant_method not in self.quant_methods:
            raise CheckpointError(
                f"{where} is named as {self.name} names it, but quantization_config.quant_method "
                f"is {settings.quant_method!r}: must be {allowed}; convert from bf16 "
                "or fp8"
            )
        if settings.bits != 4:
            raise CheckpointError(
                f"{where}: {self.name} of {settings.bits} bits is not read: must be 4"
            )
        if info.dtype != self.dtype or len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(
                f"{where} is {info.dtype} {info.shape}: must be {self.dtype}, two-dimensional"
            )
        return self.matrix(checkpoint, tensors, settings)

    def missing(self, checkpoint: Checkpoint, tensors: dict[str, str], suffix: str) -> None:
        """CheckpointError unless the module has a tensor of that suffix."""
        if suffix not in tensors:
            name = tensors[self.weight]
            raise CheckpointError(
                f"{checkpoint.info(name).file}: tensor {name!r} has no {suffix} beside it"
            )


def check(info: TensorInfo, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """CheckpointError unless a tensor has one of these dtypes and this shape."""
    if info.dtype not in dtypes or info.shape != shape:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}) is {info.dtype} "
            f"{info.shape}: must be {' or '.join(dtypes)} {shape}"
        )


def read_floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Scales as float32; CheckpointError if one is NaN or infinite."""
    raw, info = checkpoint.read(name), checkpoint.info(name)
    values = bf16_to_f32(raw) if info.dtype == "BF16" else raw.astype(np.float32, copy=False)
    return finite(values, info, name)


def finite(values: np.ndarray, info: TensorInfo, name: str) -> np.ndarray:
    """The scales of a tensor; CheckpointError if one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}): holds NaN or "
            "infinite scales"
        )
    return values
