"""GGUF blocks of every type that the kernels read, for benchmarks and tests: floats quantised,
or random bits.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ktk.experts.formats import BLOCKS, Format
from ktk.experts.formats.base import NUMPY_FLOATS
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.machine.memory import aligned_buffer
from ktk.placement.blocks import kernel_types
from ktk.quantise.blocks import quantise_rows

SCALE = 0.01
ROW_FACTOR = 64  # multipliers of a row\'s scale are some 64 in size
# Mean error of a layer's output against float64 on the same weights, relative to the mean output
# (bench/block_error.py):
# sums in fp32; BF16 kernels may round activations to 8 bits of mantissa; others round them to eight
# bits in groups.
FLOAT_BOUNDS = {"F32": 2e-6, "F16": 2e-6, "BF16": 4e-3}
EIGHT_BITS_BOUNDS = {64: 0.02, 128: 0.026}  # by activation_group
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def error_bound(kind: str, activation_group: int) -> float:
    """The bound of a type the kernels read, for normal activations;
    activation_group one of EIGHT_BITS_BOUNDS.
    """
    return FLOAT_BOUNDS.get(kind, EIGHT_BITS_BOUNDS[activation_group])


def row_bytes(kind: str, in_features: int) -> int:
    """Bytes of one row. ValueError unless ``kind`` is a type the kernels read and the row whole
    blocks of it.
    """
    if not kernel_types():
        raise ValueError(
            f"GGUF type {kind!r}: must be one of none: the compiled extension is not built"
        )
    if kind not in BLOCKS:
        raise ValueError(f"GGUF type {kind!r}: must be one of {', '.join(BLOCKS)}")
    fmt = BLOCKS[kind]
    if in_features % fmt.block:
        fitting = [name for name, f in reversed(BLOCKS.items()) if in_features % f.block == 0]
        raise ValueError(
            f"rows of {in_features} weights: {kind} needs a multiple of {fmt.block}; "
            f"{', '.join(fitting)} would do"
        )
    return fmt.row_bytes(in_features)


def halves(fmt: Format) -> list[int]:
    """Where a block holds halves that scale it: random bits there would be inf or NaN."""
    found, at = [], 0
    for plane in fmt.planes:
        if plane.dtype == "f16":
            found.append(at)
        at += plane.num_bytes(fmt.block)
    return [] if fmt.name == "IQ1_M" else found


def has_quantiser(kind: str) -> bool:
    """Whether ``quantised`` makes it of floats."""
    return kind in FLOATS or BLOCKS[kind].search is not None


def quantised(kind: str, w: np.ndarray) -> np.ndarray:
    """float32 (rows, in_features) as uint8 (rows, row bytes). ValueError as ``quantise_rows``."""
    return float_blocks(kind, w) if kind in FLOATS else quantise_rows(w, kind)


def float_blocks(kind: str, w: np.ndarray) -> np.ndarray:
    """float32 (..., in_features) as F32, F16 or BF16: uint8 (..., row bytes)."""
    codes = f32_to_bf16(w) if kind == "BF16" else w.astype(FLOATS[kind])
    return np.ascontiguousarray(codes).view(np.uint8)


def random_matrix(
    kind: str, num_experts: int, out_features: int, in_features: int, seed: int
) -> StoredMatrix:
    """Blocks of random bits with scales near SCALE, uint8 (num_experts, out_features, row bytes).

    Scales have either sign: else weights of types with minima would all be positive, every output
    the sum of the activations, and where that is near 0 their rounding all there is.
    """
    rng = np.random.default_rng(seed)
    shape = (num_experts, out_features)
    if kind in FLOATS:
        w = (rng.standard_normal((*shape, in_features)) * SCALE).astype(np.float32)
        return StoredMatrix.of_rows(kind, in_features, float_blocks(kind, w))
    fmt = BLOCKS[kind]
    blocks = rng.integers(
        0, 256, (*shape, in_features // fmt.block, fmt.block_bytes), dtype=np.uint8
    )
    sizes = (*blocks.shape[:3], 4)
    scales = ((rng.random(sizes) + 1) * SCALE * rng.choice((-1, 1), sizes)).astype(np.float16)
    for i, at in enumerate(halves(fmt)):
        blocks[..., at : at + 2] = scales[..., i : i + 1].view(np.uint8)
    if kind == "MXFP4":  # 2 ** (e - 128)
        blocks[..., 0] = rng.integers(118, 124, blocks.shape[:3])
    if kind == "IQ1_M":  # its half stands in the high nibbles of four words
        bits = scales[..., 0].view(np.uint16)
        words = np.ascontiguousarray(blocks[..., 48:56]).view(np.uint16)
        for i in range(4):
            words[..., i] = (words[..., i] & 0xFFF) | ((bits >> (4 * i) & 15) << 12)
        blocks[..., 48:56] = words.view(np.uint8)
    rows = blocks.reshape(*shape, -1)
    if fmt.row_scale:
        heads = (scales[..., 0, :1] / ROW_FACTOR).astype(NUMPY_FLOATS[fmt.row_scale])
        rows = np.concatenate([heads.view(np.uint8), rows], axis=-1)
    return StoredMatrix.of_rows(kind, in_features, rows)


def random_blocks(
    spec: MoESpec, types: tuple[str, str, str], seed: int = 0, scale_bias: float = 0.1
) -> StoredExperts:
    """Experts of ``spec`` whose gate, up and down have the given types."""
    rng = np.random.default_rng(seed)
    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size

    def bias(n: int) -> np.ndarray | None:
        return (
            (rng.standard_normal((e, n)) * scale_bias).astype(np.float32) if spec.has_bias else None
        )

    return StoredExperts(
        spec,
        random_matrix(types[0], e, i, h, seed + 1) if spec.has_gate else None,
        random_matrix(types[1], e, i, h, seed + 2),
        random_matrix(types[2], e, h, i, seed + 3),
        bias(i) if spec.has_gate else None,
        bias(i),
        bias(h),
    )


def in_turns(matrix: StoredMatrix, num_experts: int) -> StoredMatrix:
    """A copy in huge-page memory: its experts taking turns, each time in memory of their own."""
    data = aligned_buffer(num_experts * matrix.data[0].size)
    data = data.reshape(num_experts, *matrix.data.shape[1:])
    for e in range(num_experts):
        data[e] = matrix.data[e % len(matrix.data)]
    return dataclasses.replace(matrix, data=data)
