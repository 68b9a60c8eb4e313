"""How checkpoints code a matrix (plain floats, fp8, MX), and decoding it to float32 or bf16 bits.

A matrix is (out_features, in_features), row-major. Its scale tensor tells the scheme by its shape:

    fp8 block     weight e4m3 (N, K)       scale (ceil(N/block rows), ceil(K/block columns))
    fp8 channel   weight e4m3 (N, K)       scale (N,) or (N, 1)
    fp8 tensor    weight e4m3 (N, K)       scale () or (1,)
    mxfp8         weight e4m3 (N, K)       scale e8m0 (N, K/32)
    mxfp4         weight e2m1 (N, K/2)     scale e8m0 (N, K/32); low nibble first

Source: OCP Microscaling Formats specification 1.0; DeepSeek-V3 for the blocks. Four-bit integers have names and
packings of their own: ``INT4_CODINGS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint, TensorInfo
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import bf16_to_f32, e4m3_table
from ktk.models.compressed_tensors import COMPRESSED_TENSORS
from ktk.models.gptq import GPTQ
from ktk.models.int4 import Int4Coding

MX_GROUP = 32
LOOK_UP_CODES = 1 << 15
PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
SOURCE_DTYPES = (*PLAIN.values(), "fp8", "mxfp8", "mxfp4", "int4")
INT4_CODINGS: tuple[Int4Coding, ...] = (GPTQ, COMPRESSED_TENSORS)
SCALE_DTYPES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
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
        """The rows of the two-dimensional scale that rows start to stop need; start on a block's edge."""
        return start // self.block[0], -(-stop // self.block[0])


def infer_coding(
    name: str,
    weight: TensorInfo,
    scale_name: str | None,
    scale: TensorInfo | None,
    block: tuple[int, int],
    experts: int = 0,
) -> Coding:
    """The coding of tensor ``name``, from its dtype and its scale's shape.

    block : the fp8 block of the config. experts : if not 0, both tensors stack that many matrices along a
    leading dimension, which is left out of the Coding. Raises CheckpointError.
    """
    where = f"{weight.file}: tensor {name!r} (bytes {weight.begin} to {weight.end})"
    shape = _unstacked(weight.shape, experts, where)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"{where} has shape {weight.shape}: must be a matrix (out_features, in_features)"
        )
    rows, columns = shape
    if scale is None:
        if weight.dtype in PLAIN:
            return Coding(PLAIN[weight.dtype], (rows, columns))
        hint = (
            "its scale tensor is missing"
            if weight.dtype == "F8_E4M3"
            else "not a weight format ktk reads"
        )
        raise CheckpointError(
            f"{where} is {weight.dtype} without a scale: {hint}; ktk reads {', '.join(SOURCE_DTYPES)}"
        )
    what = f"{where} is {weight.dtype} with {scale_name!r} {scale.dtype} {scale.shape}"
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(f"{what}: scales must be one of {', '.join(SCALE_DTYPES)}")
    is_e8m0 = scale.dtype in ("U8", "F8_E8M0")
    # A stacked scale of one number per expert is (experts,), (experts, 1) or (experts, 1, 1).
    scales = _unstacked(scale.shape, experts, what)
    if weight.dtype == "F8_E4M3":
        if is_e8m0 and scales == (rows, -(-columns // MX_GROUP)):
            return Coding("mxfp8", (rows, columns), (1, MX_GROUP))
        if scales in ((), (1,), (1, 1)):
            return Coding("fp8", (rows, columns), (rows, columns))
        if scales in ((rows,), (rows, 1)):
            return Coding("fp8", (rows, columns), (1, columns))
        if scales == (-(-rows // block[0]), -(-columns // block[1])):
            return Coding("fp8", (rows, columns), (min(block[0], rows), min(block[1], columns)))
        raise CheckpointError(
            f"{what}: a scale must be () for the tensor, ({rows}, 1) per channel, "
            f"{(-(-rows // block[0]), -(-columns // block[1]))} for blocks of {block}, or e8m0 "
            f"({rows}, {-(-columns // MX_GROUP)})"
        )
    if weight.dtype in ("U8", "I8"):
        if is_e8m0 and columns * 2 % MX_GROUP == 0 and scales == (rows, columns * 2 // MX_GROUP):
            return Coding("mxfp4", (rows, columns * 2), (1, MX_GROUP))
        raise CheckpointError(
            f"{what}: 8-bit integers are read as mxfp4 only, whose scale is e8m0 ({rows}, {columns * 2 // MX_GROUP})"
        )
    raise CheckpointError(
        f"{what}: only F8_E4M3 and mxfp4 take a scale; ktk reads {', '.join(SOURCE_DTYPES)}"
    )


def _unstacked(shape: tuple[int, ...], experts: int, where: str) -> tuple[int, ...]:
    if not experts:
        return shape
    if not shape or shape[0] != experts:
        raise CheckpointError(f"{where} stacks {shape[:1]} experts: must be {experts}")
    return shape[1:]


def decode(coding: Coding, raw: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Raw bits of some rows to float32, or to bf16 bits (uint16) where they are bf16 already.

    raw : (rows, stored columns). scale : float32, (rows of blocks, columns of blocks) covering these rows.
    """
    if coding.name == "bf16" or coding.name == "fp32":
        return raw
    if coding.name == "fp16":
        return raw.astype(np.float32)
    assert scale is not None  # infer_coding gives a scaled coding only with one
    if coding.name == "mxfp4":
        w = _look_up(_e2m1_pairs(), raw.view(np.uint8)).view(np.float32)
    else:
        w = _decode_e4m3(raw)
    _apply_scale(w, scale, coding.block)
    return w  # (rows, in_features)


def read_scale(raw: np.ndarray, info: TensorInfo, name: str) -> np.ndarray:
    """A scale tensor's raw bits to float32; CheckpointError if one is NaN or infinite."""
    if info.dtype == "BF16":
        scale = bf16_to_f32(raw)
    elif info.dtype in ("U8", "F8_E8M0"):
        scale = e8m0_to_f32(raw)
    else:
        scale = raw.astype(np.float32, copy=False)
    if not np.isfinite(scale).all():
        raise CheckpointError(
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}): holds NaN or infinite scales"
        )
    return scale


def read_rows(
    checkpoint: Checkpoint, name: str, scale_name: str | None, coding: Coding, start: int, stop: int
) -> np.ndarray:
    """Rows start to stop of an unstacked matrix, decoded; start lies on a block's edge."""
    raw = checkpoint.read(name, (start, stop))
    if scale_name is None:
        return decode(coding, raw, None)
    info = checkpoint.info(scale_name)
    if len(info.shape) == 0 or coding.block == coding.shape:
        scale = checkpoint.read(scale_name)
    else:
        scale = checkpoint.read(scale_name, coding.scale_rows(start, stop))
    return decode(coding, raw, scale_matrix(read_scale(scale, info, scale_name)))


def scale_matrix(scale: np.ndarray) -> np.ndarray:
    """A scale of any allowed shape as two-dimensional."""
    return scale if scale.ndim == 2 else scale.reshape(-1, 1)


def e8m0_to_f32(bits: np.ndarray) -> np.ndarray:
    """2 ** (b - 127) as float32, exact; 255 is NaN."""
    power = bits.astype(np.uint32) << np.uint32(23)
    power[bits == 0] = 0x00400000  # 2**-127 is subnormal
    power[bits == 255] = 0x7FC00000
    return power.view(np.float32)


@cache
def _e4m3_pairs() -> np.ndarray:
    """Two e4m3 codes at once, as the 8 bytes of their two float32: uint64 (65536,).

    Twice the table's speed: 0.9 against 0.55 G weights/s on one Zen 4 core.
    """
    code = np.arange(65536)
    table = e4m3_table()
    pairs = np.stack([table[code & 255], table[code >> 8]], axis=1)  # (65536, 2)
    return pairs.view(np.uint64).reshape(-1)


def _decode_e4m3(raw: np.ndarray) -> np.ndarray:
    if raw.shape[-1] % 2:
        return _look_up(e4m3_table(), raw)
    return _look_up(_e4m3_pairs(), raw.view("<u2")).view(np.float32)


def _look_up(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """table[codes], in bands of rows: np.take widens the codes to 8 bytes each."""
    out = np.empty(codes.shape, table.dtype)
    band = max(1, LOOK_UP_CODES // max(codes.shape[1], 1))
    for i in range(0, codes.shape[0], band):
        # clip: without it, take buffers its output; every code is in range
        np.take(table, codes[i : i + band], out=out[i : i + band], mode="clip")
    return out


@cache
def _e2m1_pairs() -> np.ndarray:
    """The two values of each byte of e2m1 codes, low nibble first, as their 8 bytes: uint64 (256,)."""
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    value = np.concatenate([magnitude, -magnitude])
    byte = np.arange(256)
    return np.stack([value[byte & 15], value[byte >> 4]], axis=1).view(np.uint64).reshape(-1)


def _apply_scale(w: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> None:
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
