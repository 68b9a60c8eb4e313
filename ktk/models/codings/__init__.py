"""How checkpoints code their matrices: plain floats, fp8 and MX with scales beside them,
4-bit integers of other tools. One file a coding.
"""

from __future__ import annotations

import numpy as np

from ktk.checkpoint.safetensors import TensorInfo
from ktk.errors import CheckpointError
from ktk.models.codings.compressed_tensors import COMPRESSED_TENSORS
from ktk.models.codings.fp8 import FP8, MXFP8
from ktk.models.codings.gptq import GPTQ
from ktk.models.codings.int4 import Int4Coding
from ktk.models.codings.mxfp4 import MXFP4
from ktk.models.codings.scaled import (
    E8M0_DTYPES,
    SCALE_DTYPES,
    Coding,
    ScaledCoding,
    Shapes,
    apply_scale,
)

PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # by safetensors' dtype
# The first that fits: e8m0 scales of small matrices can have the shape that blocks of fp8 have,
# too.
SCALED: tuple[ScaledCoding, ...] = (MXFP8, FP8, MXFP4)
# The first whose weight suffix a module has.
INT4_CODINGS: tuple[Int4Coding, ...] = (GPTQ, COMPRESSED_TENSORS)
SOURCE_DTYPES = (*PLAIN.values(), "fp8", "mxfp8", "mxfp4", "int4")
# Suffixes that only codings ktk does not read use; the text says which.
FOREIGN_SUFFIXES = {
    "weight_scale_2": "NVFP4",
    "absmax": "bitsandbytes",
    "quant_state": "bitsandbytes",
}


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
            if weight.dtype == "F8_E4M3"
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
            f"{what}: only F8_E4M3 and mxfp4 take a scale; ktk reads {', '.join(SOURCE_DTYPES)}"
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
