"""AWQ, "gemm" layout: ``qweight`` and ``qzeros`` packed along out_features, ``scales``.

    qweight (K, N/8) int32    qzeros (groups, N/8) int32    scales (groups, N)

The eight codes of a word are those of columns 0 2 4 6 1 3 5 7, the lowest bits first.
Source: AutoAWQ, its checkpoints' documentation.
"""

from __future__ import annotations

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.models.codings.int4 import PER_WORD, Int4Coding, Int4Matrix, groups_of, unpack
from ktk.models.codings.module import ModuleMatrix, QuantSettings, check, read_floats

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = np.argsort(_ORDER)  # of column c in its word


def _columns(words: np.ndarray) -> np.ndarray:
    """int32 (rows, words) to codes, uint8 (8 * words, rows)."""
    codes = unpack(words).reshape(len(words), -1, PER_WORD)
    return np.ascontiguousarray(codes[:, :, _PLACE].reshape(len(words), -1).T)


class _AwqMatrix(Int4Matrix):
    def codes(self, checkpoint: Checkpoint) -> np.ndarray:
        return _columns(checkpoint.read(self.tensors["qweight"]))

    def scales(self, checkpoint: Checkpoint) -> np.ndarray:
        return np.ascontiguousarray(read_floats(checkpoint, self.tensors["scales"]).T)

    def zero_points(self, checkpoint: Checkpoint) -> np.ndarray:
        return _columns(checkpoint.read(self.tensors["qzeros"])).astype(np.int16)


class _Awq(Int4Coding):
    name = "AWQ"
    quant_methods = ("awq",)
    weight = "qweight"
    suffixes = frozenset({"qweight", "qzeros", "scales"})
    marks = frozenset({"qweight"})

    def matrix(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: QuantSettings
    ) -> ModuleMatrix:
        name = tensors["qweight"]
        info = checkpoint.info(name)
        if settings.version != "gemm":
            raise CheckpointError(
                f"{info.file}: tensor {name!r}: AWQ's version {settings.version!r} is not read: "
                "must be 'gemm'; convert from bf16"
            )
        for suffix in ("qzeros", "scales"):
            self.missing(checkpoint, tensors, suffix)
        inputs, outputs = info.shape[0], info.shape[1] * PER_WORD
        groups = groups_of(checkpoint, tensors["scales"], inputs, outputs)
        qzeros = tensors["qzeros"]
        check(checkpoint.info(qzeros), qzeros, ("I32",), (groups, outputs // PER_WORD))
        return _AwqMatrix(name, tensors, (outputs, inputs), groups)


AWQ = _Awq()
