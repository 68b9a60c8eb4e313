"""NVFP4: e2m1 codes, two a byte, the first in the low nibble; an e4m3 scale for 16 of a row, and an
fp32 scale of the matrix.

    compressed-tensors, "nvfp4-pack-quantized"    ModelOpt
    weight_packed u8 (N, K/2)                     weight u8 (N, K/2)
    weight_scale e4m3 (N, K/16)                   weight_scale e4m3 (N, K/16)
    weight_global_scale (1,): it divides          weight_scale_2 (): it multiplies
    input_global_scale                            input_scale

Source: compressed-tensors, compressors/nvfp4; ModelOpt's exported checkpoints, as vLLM reads them.
"""

from __future__ import annotations

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import e4m3_to_f32
from ktk.experts.stored import CodedMatrix
from ktk.models.codings.module import (
    ModuleCoding,
    ModuleMatrix,
    QuantSettings,
    check,
    finite,
    read_floats,
)
from ktk.models.codings.mxfp4 import nibbles

GROUP = 16


class _Nvfp4Matrix(ModuleMatrix):
    dtype = "nvfp4"

    def __init__(
        self, name: str, tensors: dict[str, str], shape: tuple[int, int], tensor_scale: float
    ) -> None:
        super().__init__(name, tensors, shape)
        self.tensor_scale = tensor_scale

    def panel_format(self, checkpoint: Checkpoint) -> tuple[str, int]:
        return "nvfp4", GROUP

    def read_coded(self, checkpoint: Checkpoint) -> CodedMatrix:
        name = self.tensors["weight_scale"]
        scales = finite(e4m3_to_f32(checkpoint.read(name)), checkpoint.info(name), name)
        codes = nibbles(checkpoint.read(self.name))
        return CodedMatrix(codes, scales, PANELS["nvfp4"], (1, GROUP), self.tensor_scale)

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        return self.read_coded(checkpoint).dequantised()


class _Nvfp4(ModuleCoding):
    dtype = "U8"

    def __init__(
        self, name: str, quant_methods: tuple[str, ...], weight: str, scale: str, of_inputs: str
    ) -> None:
        self.name, self.quant_methods, self.weight, self.scale = name, quant_methods, weight, scale
        self.marks = frozenset({weight, scale})
        self.suffixes = self.marks | {"weight_scale", of_inputs}

    def matrix(
        self, checkpoint: Checkpoint, tensors: dict[str, str], settings: QuantSettings
    ) -> ModuleMatrix:
        self.missing(checkpoint, tensors, "weight_scale")
        name, of_matrix = tensors[self.weight], tensors[self.scale]
        rows, columns = checkpoint.info(name).shape
        columns *= 2
        if columns % GROUP:
            raise CheckpointError(
                f"{checkpoint.info(name).file}: tensor {name!r} holds rows of {columns} weights: "
                f"must be a multiple of {GROUP}"
            )
        scales = tensors["weight_scale"]
        check(checkpoint.info(scales), scales, ("F8_E4M3",), (rows, columns // GROUP))
        info = checkpoint.info(of_matrix)
        check(info, of_matrix, ("F32",), info.shape if info.shape in ((), (1,)) else (1,))
        value = np.float32(read_floats(checkpoint, of_matrix).reshape(()))
        if self.scale == "weight_global_scale":
            with np.errstate(divide="ignore", over="ignore"):
                value = np.float32(1) / value
            finite(np.asarray(value), info, of_matrix)
        return _Nvfp4Matrix(name, tensors, (rows, columns), float(value))


NVFP4_PACKED = _Nvfp4(
    "compressed-tensors NVFP4",
    ("compressed-tensors",),
    "weight_packed",
    "weight_global_scale",
    "input_global_scale",
)
NVFP4_MODELOPT = _Nvfp4(
    "ModelOpt's NVFP4",
    ("modelopt", "modelopt_fp4", ""),  # older exports leave it to hf_quant_config.json
    "weight",
    "weight_scale_2",
    "input_scale",
)
