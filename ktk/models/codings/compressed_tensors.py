"""compressed-tensors, "pack-quantized" of 4 bits: ``weight_packed``, ``weight_scale``,
``weight_shape``.

    weight_packed (N, K/8) int32    weight_scale (N, groups)    weight_shape (2,) = N, K
    weight_zero_point (N/8, groups) int32, packed along N, if asymmetric
    weight_g_idx (K,), if columns were reordered

Codes are stored with 8 added. Source: compressed-tensors 0.20, compressors/pack_quantized.
"""

from __future__ import annotations

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.models.codings.int4 import PER_WORD, Int4Coding, Int4Matrix, groups_of, unpack
from ktk.models.codings.module import ModuleMatrix, QuantSettings, check, read_floats


class _PackedMatrix(Int4Matrix):
    def codes(self, checkpoint: Checkpoint) -> np.ndarray:
        codes = unpack(checkpoint.read(self.tensors["weight_packed"]))
        return codes[:, : self.shape[1]]

    def scales(self, checkpoint: Checkpoint) -> np.ndarray:
        return read_floats(checkpoint, self.tensors["weight_scale"])

    def zero_points(self, checkpoint: Checkpoint) -> np.ndarray | None:
        name = self.tensors.get("weight_zero_point")
        if name is None:
            return None
        words = checkpoint.read(name)  # (N/8, groups)
        return unpack(words.T).T[: self.shape[0]].astype(np.int16)


class _CompressedTensors(Int4Coding):
    name = "compressed-tensors int4"
    quant_methods = ("compressed-tensors",)
    weight = "weight_packed"
    marks = frozenset({"weight_packed"})
    suffixes = frozenset(
        {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
    )

    def matrix(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: QuantSettings
    ) -> ModuleMatrix:
        name = tensors["weight_packed"]
        info = checkpoint.info(name)
        for suffix in ("weight_scale", "weight_shape"):
            self.missing(checkpoint, tensors, suffix)
        if "weight_g_idx" in tensors:
            raise CheckpointError(
                f"{info.file}: tensor {tensors['weight_g_idx']!r}: reordered columns are not "
                "read; convert from bf16"
            )
        shape_info = checkpoint.info(tensors["weight_shape"])
        check(shape_info, tensors["weight_shape"], (shape_info.dtype,), (2,))
        rows, columns = map(int, checkpoint.read(tensors["weight_shape"]))
        if info.shape != (rows, -(-columns // PER_WORD)):
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {info.shape}: {tensors['weight_shape']!r} says "
                f"({rows}, {columns}), so it must be {(rows, -(-columns // PER_WORD))}"
            )
        groups = groups_of(checkpoint, tensors["weight_scale"], columns, rows, axis=1)
        if "weight_zero_point" in tensors:
            zero = tensors["weight_zero_point"]
            check(checkpoint.info(zero), zero, ("I32",), (-(-rows // PER_WORD), groups))
        return _PackedMatrix(name, tensors, (rows, columns), groups)


COMPRESSED_TENSORS = _CompressedTensors()
