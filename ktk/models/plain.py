"""The tensors of a checkpoint that are not experts', quantised ones as bf16:
what a model needs beside its packed experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ktk.checkpoint.safetensors import DTYPES, Checkpoint, TensorInfo
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import f32_to_bf16
from ktk.models.codings import (
    FOREIGN_SUFFIXES,
    FP8_DTYPES,
    MODULE_CODINGS,
    infer_coding,
    module_coding,
)
from ktk.models.codings.fp8 import fp8_block
from ktk.models.codings.module import ModuleMatrix, QuantSettings
from ktk.models.codings.scaled import SCALE_SUFFIXES
from ktk.models.codings.stored import Stored
from ktk.models.config import Config

DEQUANTISE_WEIGHTS = 4 << 20  # decoded at a time: 16 MB of float32


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is not an expert's, as it is handed out.

    dtype : as safetensors names it. coded : what it is decoded from; None if it is handed out as it
        is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    itemsize: int
    coded: Stored | ModuleMatrix | None = None

    @classmethod
    def decoded(cls, name: str, coded: Stored | ModuleMatrix) -> PlainTensor:
        """A quantised matrix as bf16."""
        rows, columns = coded.shape
        return cls(name, "BF16", coded.shape, rows * columns * 2, 2, coded)

    def pieces(self, checkpoint: Checkpoint, chunk_bytes: int) -> Iterator[memoryview]:
        """Its bytes in order; each piece is valid until the next is asked for."""
        if self.coded is None:
            yield from checkpoint.chunks(self.name, chunk_bytes)
        else:
            for w in self.coded.bands(checkpoint, DEQUANTISE_WEIGHTS):
                yield f32_to_bf16(w).data.cast("B")

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """All of it, raw bits as ``Checkpoint.read`` gives them."""
        out = np.empty(self.shape, DTYPES[self.dtype])
        view, at = out.reshape(-1).view(np.uint8), 0
        for piece in self.pieces(checkpoint, max(self.nbytes, 1)):
            view[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
        return out


def plain_tensors(checkpoint: Checkpoint, taken: set[str], config: Config) -> list[PlainTensor]:
    """All tensors but ``taken``, in the files' order; quantised weights as bf16, without what
    belongs to them.

    They are decoded because whoever takes them no longer has the quantization_config that tells
    their coding.
    """
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in taken}
    decoded: dict[str, PlainTensor] = {}
    dropped: set[str] = set()
    weights = {row.weight for row in MODULE_CODINGS}
    suffixes = frozenset().union(*(row.suffixes for row in MODULE_CODINGS))
    settings = QuantSettings.of(config)
    for name, info in tensors.items():
        foreign = FOREIGN_SUFFIXES.get(name.rsplit(".", 1)[-1])
        if foreign:
            raise CheckpointError(
                f"{info.file}: tensor {name!r}: {foreign} is not read; convert from a bf16 or fp8 "
                "checkpoint"
            )
        stem, _, suffix = name.rpartition(".")
        if suffix not in weights:
            continue
        beside = {s for s in suffixes if f"{stem}.{s}" in tensors}
        row = module_coding(beside, settings)
        if row is not None and row.weight == suffix:
            parts = {s: f"{stem}.{s}" for s in row.suffixes & beside}
            matrix = row.open(checkpoint, parts, settings)
            decoded[name] = PlainTensor.decoded(f"{stem}.weight", matrix)
            dropped.update(set(parts.values()) - {name})
    for name in tensors:
        if name in decoded or name in dropped:
            continue  # a module's scale may be fp8 itself
        info, stem = tensors[name], name.removesuffix(".weight")
        scale = _scale_of(name, info, stem, tensors)
        if info.dtype in FP8_DTYPES or scale is not None:
            coding = infer_coding(
                name, info, scale, None if scale is None else tensors[scale], fp8_block(config)
            )
            decoded[name] = PlainTensor.decoded(name, Stored(name, scale, coding))
            dropped.update(
                {scale or name, f"{stem}.input_scale", f"{stem}.activation_scale"} - {name}
            )
    plain = []
    for name, info in tensors.items():
        if name in decoded:
            plain.append(decoded[name])
        elif name not in dropped:
            itemsize = DTYPES[info.dtype].itemsize
            plain.append(PlainTensor(name, info.dtype, info.shape, info.nbytes, itemsize))
    return plain


def _scale_of(name: str, info: TensorInfo, stem: str, tensors: dict[str, TensorInfo]) -> str | None:
    """The scale of an fp8 or mxfp4 weight, or None."""
    if info.dtype not in (*FP8_DTYPES, "I8", "U8"):
        return None
    names = [f"{stem}.{suffix}" for suffix in SCALE_SUFFIXES] if stem != name else []
    return next((n for n in (*names, f"{name}_scale_inv", f"{name}_scale") if n in tensors), None)
