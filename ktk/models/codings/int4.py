"""4-bit weights that other tools packed into int32 words, eight codes to a word, the first in the
lowest bits.

Symmetric codes come out as int4's, asymmetric ones as int4_asym's; those whose columns were
reordered, as float32.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.formats import PANELS
from ktk.experts.stored import CodedMatrix
from ktk.models.codings.module import ModuleCoding, ModuleMatrix, check

PER_WORD = 8
SYMMETRIC_ZERO = 8


class Int4Matrix(ModuleMatrix):
    """One matrix of 4-bit codes. num_groups : scales of a row."""

    dtype = "int4"

    def __init__(
        self, name: str, tensors: dict[str, str], shape: tuple[int, int], num_groups: int
    ) -> None:
        super().__init__(name, tensors, shape)
        self.num_groups, self.group_size = num_groups, shape[1] // num_groups

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

    def is_ordered(self, checkpoint: Checkpoint) -> bool:
        """Whether the columns of each group lie side by side, the first group first."""
        return np.array_equal(self.groups(checkpoint), Int4Matrix.groups(self, checkpoint))

    def panel_format(self, checkpoint: Checkpoint) -> tuple[str, int] | None:
        if not self.is_ordered(checkpoint):
            return None
        group = 0 if self.num_groups == 1 else self.group_size
        fitting = [g for g in (128, 64, 32) if group % g == 0]
        if not fitting:
            return None
        zeros = self.zero_points(checkpoint)
        is_symmetric = zeros is None or bool((zeros == SYMMETRIC_ZERO).all())
        return "int4" if is_symmetric else "int4_asym", fitting[0] if group else 0

    def read_coded(self, checkpoint: Checkpoint) -> CodedMatrix | None:
        if not self.is_ordered(checkpoint):
            return None
        codes, scales = self.codes(checkpoint), self.scales(checkpoint)
        block, zeros = (1, self.group_size), self.zero_points(checkpoint)
        if zeros is not None and (zeros != SYMMETRIC_ZERO).any():
            given = zeros.astype(np.uint8)
            return CodedMatrix(codes, scales, PANELS["int4_asym"], block, zero_points=given)
        signed = codes.astype(np.int8) - np.int8(SYMMETRIC_ZERO)
        return CodedMatrix(signed, scales, PANELS["int4"], block)

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        groups, scales = self.groups(checkpoint), self.scales(checkpoint)
        zeros = self.zero_points(checkpoint)
        codes = self.codes(checkpoint).astype(np.float32)
        if zeros is None:
            return (codes - np.float32(SYMMETRIC_ZERO)) * scales[:, groups]
        return (codes - zeros.astype(np.float32)[:, groups]) * scales[:, groups]


class Int4Coding(ModuleCoding):
    """Codes of 4 bits in words of 32."""

    dtype = "I32"


def groups_of(checkpoint: Checkpoint, name: str, inputs: int, outputs: int, axis: int = 0) -> int:
    """How many groups a row has, by its scales, which are checked: (groups, outputs), or with axis
    1 (outputs, groups). CheckpointError if they are not, or ``inputs`` is no multiple of groups.
    """
    info = checkpoint.info(name)
    groups = info.shape[axis] if len(info.shape) == 2 else 0
    if not groups or inputs % groups:
        wanted = f"({outputs}, groups)" if axis else f"(groups, {outputs})"
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {info.shape}: must be {wanted}, {inputs} a multiple "
            "of groups"
        )
    shape = (outputs, groups) if axis else (groups, outputs)
    check(info, name, ("F16", "BF16", "F32"), shape)
    return groups


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 (rows, words) to codes, uint8 (rows, 8 * words), 0 to 15."""
    pairs = np.ascontiguousarray(words).view(np.uint8)  # two codes a byte, the lower first
    return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(words), -1)
