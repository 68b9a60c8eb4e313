"""Weights that a scale tensor beside them completes: which coding it is follows from dtypes and the
scale's shape.

A matrix is (out_features, in_features), row-major. A row of ``ktk.models.codings.SCALED`` says
which dtypes and shapes are its own and what a code means; scales are applied here. Four-bit
integers have names and packings of their own: ``codings.int4``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktk.checkpoint.safetensors import TensorInfo
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import bf16_to_f32

MX_GROUP = 32  # weights that share an e8m0 scale
E8M0_DTYPES = ("U8", "F8_E8M0")
SCALE_DTYPES = ("F32", "BF16", "F16", *E8M0_DTYPES)
SCALE_SUFFIXES = ("weight_scale_inv", "weight_scale", "scale")


@dataclass(frozen=True)
class Coding:
    """What one stored matrix is. name : one of SOURCE_DTYPES. shape : decoded (out, in).

    block : rows and columns that share a scale; (0, 0) for plain floats.
    """

    name: str
    shape: tuple[int, int]
    block: tuple[int, int] = (0, 0)

    def scale_rows(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the two-dimensional scale that rows start to stop need;
        start on a block's edge.
        """
        return start // self.block[0], -(-stop // self.block[0])


@dataclass(frozen=True)
class Shapes:
    """What a coding is told from.

    stored : (rows, columns) of the codes. block : rows and columns, by the config, of fp8.
    """

    stored: tuple[int, int]
    scales: tuple[int, ...]
    is_e8m0: bool
    block: tuple[int, int]

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """How many blocks of that size the codes have, begun ones counted."""
        return -(-self.stored[0] // rows), -(-self.stored[1] // columns)


class ScaledCoding(ABC):
    """One way to code. name : of SOURCE_DTYPES. weight_dtypes :
    what safetensors calls its codes.
    """

    name: str
    weight_dtypes: tuple[str, ...]

    @abstractmethod
    def fit(self, found: Shapes) -> Coding | None:
        """The coding of codes and scales of these shapes, None if it is not this one."""

    @abstractmethod
    def wanted(self, found: Shapes) -> str:
        """Which scales would fit, for an error."""

    @abstractmethod
    def values(self, raw: np.ndarray) -> np.ndarray:
        """Codes (rows, stored columns) to float32 (rows, in_features), not scaled yet."""


def read_scale(raw: np.ndarray, info: TensorInfo, name: str) -> np.ndarray:
    """A scale tensor's raw bits to float32; CheckpointError if one is NaN or infinite."""
    if info.dtype == "BF16":
        scale = bf16_to_f32(raw)
    elif info.dtype in E8M0_DTYPES:
        scale = e8m0_to_f32(raw)
    else:
        scale = raw.astype(np.float32, copy=False)
    if not np.isfinite(scale).all():
        raise CheckpointError(
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}): holds NaN or "
            "infinite scales"
        )
    return scale


def scale_matrix(scale: np.ndarray) -> np.ndarray:
    """A scale of any allowed shape as two-dimensional."""
    return scale if scale.ndim == 2 else scale.reshape(-1, 1)


def e8m0_to_f32(bits: np.ndarray) -> np.ndarray:
    """2 ** (b - 127) as float32, exact; 255 is NaN."""
    power = bits.astype(np.uint32) << np.uint32(23)
    power[bits == 0] = 0x00400000  # 2**-127 is subnormal
    power[bits == 255] = 0x7FC00000
    return power.view(np.float32)


def apply_scale(w: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> None:
    """Multiply w (rows, columns) in place by scale, one number per block of rows and columns."""
    rows, columns = w.shape
    high, wide = block
    if (
        rows % min(high, rows) == 0
        and columns % wide == 0
        and scale.shape[0] * min(high, rows) == rows
    ):
        tiles: np.ndarray[Any, Any] = w.reshape(
            scale.shape[0], min(high, rows), columns // wide, wide
        )
        tiles *= scale[:, None, :, None]
        return
    for i in range(scale.shape[0]):
        band = w[i * high : (i + 1) * high]
        band *= np.repeat(scale[i], wide)[None, :columns]
