"""GPTQ: ``qweight`` packed along in_features, ``qzeros`` along out_features, ``scales``, ``g_idx``.

    qweight (K/8, N) int32    qzeros (groups, N/8) int32    scales (groups, N)
    g_idx (K,) int32, may be missing

Version 1 of the format stores zero points less one; "checkpoint_format": "gptq_v2" stores them as
they are.
Source: AutoGPTQ and GPTQModel, their checkpoints' documentation.
"""

from __future__ import annotations

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.models.codings.int4 import PER_WORD, Int4Coding, Int4Matrix, groups_of, unpack
from ktk.models.codings.module import ModuleMatrix, QuantSettings, check, read_floats


class _GptqMatrix(Int4Matrix):
    zero_offset = 1

    def codes(self, checkpoint: Checkpoint) -> np.ndarray:
        words = checkpoint.read(self.tensors["qweight"])  # (K/8, N)
        return unpack(words.T)

    def scales(self, checkpoint: Checkpoint) -> np.ndarray:
        return np.ascontiguousarray(read_floats(checkpoint, self.tensors["scales"]).T)

    def zero_points(self, checkpoint: Checkpoint) -> np.ndarray | None:
        words = checkpoint.read(self.tensors["qzeros"])  # (groups, N/8)
        return (unpack(words).T.astype(np.int16) + self.zero_offset) & 15

    def groups(self, checkpoint: Checkpoint) -> np.ndarray:
        name = self.tensors.get("g_idx")
        if name is None:
            return super().groups(checkpoint)
        groups = checkpoint.read(name)
        if groups.min() < 0 or groups.max() >= self.num_groups:
            info = checkpoint.info(name)
            raise CheckpointError(
                f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}): groups must be "
                f"0 to {self.num_groups - 1}"
            )
        return groups


class _Gptq(Int4Coding):
    name = "GPTQ"
    quant_methods = ("gptq",)
    weight = "qweight"
    marks = frozenset({"qweight"})
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def matrix(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: QuantSettings
    ) -> ModuleMatrix:
        info = checkpoint.info(tensors["qweight"])
        for suffix in ("qzeros", "scales"):
            self.missing(checkpoint, tensors, suffix)
        inputs, outputs = info.shape[0] * PER_WORD, info.shape[1]
        if outputs % PER_WORD:
            raise CheckpointError(
                f"{info.file}: tensor {tensors['qweight']!r} is {info.shape}: must have columns a "
                f"multiple of {PER_WORD}"
            )
        groups = groups_of(checkpoint, tensors["scales"], inputs, outputs)
        qzeros = tensors["qzeros"]
        check(checkpoint.info(qzeros), qzeros, ("I32",), (groups, outputs // PER_WORD))
        if "g_idx" in tensors:
            check(checkpoint.info(tensors["g_idx"]), tensors["g_idx"], ("I32",), (inputs,))
        matrix = _GptqMatrix(tensors["qweight"], tensors, (outputs, inputs), groups)
        matrix.zero_offset = 0 if settings.checkpoint_format == "gptq_v2" else 1
        return matrix


GPTQ = _Gptq()
