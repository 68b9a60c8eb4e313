"""How checkpoints code their matrices: plain floats, fp8 and MX with scales beside them,
NVFP4 and 4-bit integers of other tools. One file a coding.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ktk.checkpoint.safetensors import TensorInfo
from ktk.errors import CheckpointError
from ktk.models.codings.awq import AWQ
from ktk.models.codings.compressed_tensors import COMPRESSED_TENSORS
from ktk.models.codings.fp8 import FP8, FP8_E5M2, MXFP8
from ktk.models.codings.gptq import GPTQ
from ktk.models.codings.module import ModuleCoding, QuantSettings
from ktk.models.codings.mxfp4 import MXFP4
from ktk.models.codings.nvfp4 import NVFP4_MODELOPT, NVFP4_PACKED
from ktk.models.codings.scaled import (
    E8M0_DTYPES,
    SCALE_DTYPES,
    Coding,
    ScaledCoding,
    Shapes,
    apply_scale,
)

PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # by safetensors' dtype
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
# The first that fits: e8m0 scales of small matrices can have the shape that blocks of fp8 have,
# too.
SCALED: tuple[ScaledCoding, ...] = (MXFP8, FP8, FP8_E5M2, MXFP4)
# The first that a module's tensors and the config's quant_method fit.
MODULE_CODINGS: tuple[ModuleCoding, ...] = (
    NVFP4_PACKED,
    NVFP4_MODELOPT,
    GPTQ,
    AWQ,
    COMPRESSED_TENSORS,
)
SOURCE_DTYPES = (*PLAIN.values(), "fp8", "fp8_e5m2", "mxfp8", "mxfp4", "nvfp4", "int4")
# Suffixes that only codings ktk does not read use; the text says which.
FOREIGN_SUFFIXES = {
    "absmax": "bitsandbytes",
    "quant_state": "bitsandbytes",
}


def module_coding(suffixes: Collection[str], settings: QuantSettings) -> ModuleCoding | None:
    """The row of MODULE_CODINGS of a module with these tensors, None if it is none's.

    Where only its names fit, a row's ``open`` says what does not.
    """
    named = [row for row in MODULE_CODINGS if row.is_named(suffixes)]
    fitting = [row for row in named if settings.quant_method in row.quant_methods]
    return next(iter((*fitting, *named)), None)


def infer_coding(
    name: str,
    weight: TensorInfo,
    scale_name: str | None,
    scale: TensorInfo | None,
    block: tuple[int, int],
    experts: int = 0,
) -> Coding:
    """The coding of tensor ``name``, from its dtype and its scale's shape.

    block : the fp8 block of the config. experts : if not 0, both tensors stack that many matrices
    along a leading dimension, which is left out of the Coding. Raises CheckpointError.
    """
    where = f"{weight.file}: tensor {name!r} (bytes {weight.begin} to {weight.end})"
    shape = _unstacked(weight.shape, experts, where)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"{where} has shape {weight.shape}: must be a matrix (out_features, in_features)"
        )
    stored = shape[0], shape[1]
    if scale is None:
        if weight.dtype in PLAIN:
            return Coding(PLAIN[weight.dtype], stored)
        hint = (
            "its scale tensor is missing"
            if weight.dtype in FP8_DTYPES
            else "not a weight format ktk reads"
        )
        raise CheckpointError(
            f"{where} is {weight.dtype} without a scale: {hint}; ktk reads "
            f"{', '.join(SOURCE_DTYPES)}"
        )
    what = f"{where} is {weight.dtype} with {scale_name!r} {scale.dtype} {scale.shape}"
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(f"{what}: scales must be one of {', '.join(SCALE_DTYPES)}")
    # A stacked scale of one number per expert is (experts,), (experts, 1) or (experts, 1, 1).
    scales = _unstacked(scale.shape, experts, what)
    shapes = Shapes(stored, scales, scale.dtype in E8M0_DTYPES, block)
    rows = [row for row in SCALED if weight.dtype in row.weight_dtypes]
    for row in rows:
        coding = row.fit(shapes)
        if coding is not None:
            return coding
    if not rows:
        raise CheckpointError(
            f"{what}: only {', '.join(FP8_DTYPES)} and mxfp4 take a scale; ktk reads "
            f"{', '.join(SOURCE_DTYPES)}"
        )
    wanted = [row.wanted(shapes) for row in reversed(rows)]
    raise CheckpointError(f"{what}: {', or '.join(wanted)}")


def _unstacked(shape: tuple[int, ...], experts: int, where: str) -> tuple[int, ...]:
    if not experts:
        return shape
    if not shape or shape[0] != experts:
        raise CheckpointError(f"{where} stacks {shape[:1]} experts: must be {experts}")
    return shape[1:]


def decode(coding: Coding, raw: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Raw bits of some rows to float32, or to bf16 bits (uint16) where they are bf16 already.

    raw : (rows, stored columns). scale : float32, (rows of blocks, columns of blocks) covering
        these rows.
    """
    if coding.name == "bf16" or coding.name == "fp32":
        return raw
    if coding.name == "fp16":
        return raw.astype(np.float32)
    assert scale is not None  # infer_coding gives a scaled coding only with one
    row = next(row for row in SCALED if row.name == coding.name)
    w = row.values(raw)
    apply_scale(w, scale, coding.block)
    return w  # (rows, in_features)
