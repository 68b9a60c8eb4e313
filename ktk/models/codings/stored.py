"""One matrix as it lies in a checkpoint: alone or stacked over experts,
plain or with a scale tensor beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.formats import PANELS
from ktk.experts.stored import CodedMatrix
from ktk.models.codings import decode
from ktk.models.codings.mxfp4 import mxfp4_blocks, nibbles
from ktk.models.codings.scaled import Coding, read_scale, scale_matrix


@dataclass(frozen=True)
class Stored:
    """The tensor ``name`` with the tensor ``scale``, or None.

    coding : of one matrix, where several are stacked.
    """

    name: str
    scale: str | None
    coding: Coding

    @property
    def dtype(self) -> str:
        """One of SOURCE_DTYPES."""
        return self.coding.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.coding.shape

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """The whole of an unstacked matrix, decoded: (out_features, in_features)."""
        scale = None if self.scale is None else checkpoint.read(self.scale)
        return self._decode(checkpoint, checkpoint.read(self.name), scale)

    def read_expert(self, checkpoint: Checkpoint, expert: int) -> np.ndarray:
        """One expert of a stacked matrix, decoded."""
        rows = (expert, expert + 1)
        raw = checkpoint.read(self.name, rows)[0]
        scale = None if self.scale is None else checkpoint.read(self.scale, rows)[0]
        # mxfp4 of gpt-oss: (rows, blocks, 16 bytes)
        return self._decode(checkpoint, raw.reshape(raw.shape[0], -1), scale)

    def panel_format(self, checkpoint: Checkpoint) -> tuple[str, int] | None:
        """The format of panels that keeps its codes, and the group size; None if there is none."""
        if self.scale is None:
            return None
        name, (high, wide) = self.dtype, self.coding.block
        if name in ("mxfp4", "mxfp8"):
            return name, wide
        rows, columns = self.shape
        if name == "fp8" and (high, wide) == (min(128, rows), min(128, columns)):
            return name, 128
        if wide == columns and high in (1, rows):
            return "fp8_channel" if name == "fp8" else name, 0
        return None

    def read_coded(self, checkpoint: Checkpoint) -> CodedMatrix | None:
        """Codes that panels take as they are; None where none do."""
        scale = None if self.scale is None else checkpoint.read(self.scale)
        return self._coded(checkpoint, checkpoint.read(self.name), scale)

    def read_coded_expert(self, checkpoint: Checkpoint, expert: int) -> CodedMatrix | None:
        """The same of one expert of a stacked matrix."""
        rows = (expert, expert + 1)
        scale = None if self.scale is None else checkpoint.read(self.scale, rows)[0]
        raw = checkpoint.read(self.name, rows)[0]
        return self._coded(checkpoint, raw.reshape(raw.shape[0], -1), scale)

    def _coded(
        self, checkpoint: Checkpoint, raw: np.ndarray, scale: np.ndarray | None
    ) -> CodedMatrix | None:
        found = self.panel_format(checkpoint)
        if found is None or self.scale is None or scale is None:
            return None
        values = read_scale(np.asarray(scale), checkpoint.info(self.scale), self.scale)
        codes = nibbles(raw) if self.dtype == "mxfp4" else raw
        scales = scale_matrix(values)
        return CodedMatrix(codes, scales, PANELS[found[0]], self.coding.block)

    def bands(self, checkpoint: Checkpoint, weights: int) -> Iterator[np.ndarray]:
        """An unstacked matrix, decoded, about ``weights`` at a time: whole blocks of rows."""
        rows, columns = self.shape
        high = self.coding.block[0]
        step = max(weights // columns // high, 1) * high
        for start in range(0, rows, step):
            yield self._rows(checkpoint, start, min(start + step, rows))

    def read_mxfp4(self, checkpoint: Checkpoint, expert: int | None = None) -> np.ndarray:
        """The MXFP4 blocks of a matrix, or of one of a stacked one: uint8 (out_features,
        row bytes), as GGUF has them.
        """
        rows = None if expert is None else (expert, expert + 1)
        assert self.scale is not None
        raw, scale = checkpoint.read(self.name, rows), checkpoint.read(self.scale, rows)
        out, ins = self.shape
        try:
            return mxfp4_blocks(raw.reshape(out, ins // 2), scale.reshape(out, -1))
        except ValueError as error:
            info = checkpoint.info(self.scale)
            raise CheckpointError(f"{info.file}: tensor {self.scale!r}: {error}") from None

    def _rows(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, decoded; start lies on a block's edge."""
        raw = checkpoint.read(self.name, (start, stop))
        if self.scale is None:
            return self._decode(checkpoint, raw, None)
        is_one = not checkpoint.info(self.scale).shape or self.coding.block == self.shape
        rows = None if is_one else self.coding.scale_rows(start, stop)
        return self._decode(checkpoint, raw, checkpoint.read(self.scale, rows))

    def _decode(
        self, checkpoint: Checkpoint, raw: np.ndarray, scale: np.ndarray | None
    ) -> np.ndarray:
        if self.scale is None or scale is None:
            return decode(self.coding, raw, None)
        values = read_scale(np.asarray(scale), checkpoint.info(self.scale), self.scale)
        return decode(self.coding, raw, scale_matrix(values))
