"""Random GGUF blocks of every type that the kernels read."""

from __future__ import annotations

import gguf
import numpy as np

from ktk._cy import native_module
from ktk.backends.llamafile import formats
from ktk.layout import PANEL
from ktk.reference.fma import fma
from ktk.reference.linear import linear_float, quantise_activations
from ktk.reference.moe import ExactExperts
from ktk.types import BlockExperts, BlockMatrix, MoESpec

# Where a block holds halves that scale it: random bits there would be inf or NaN.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
}  # fmt: skip
SCALE = 0.01


def random_matrix(
    kind: str, num_experts: int, out_features: int, in_features: int, seed: int
) -> BlockMatrix:
    """Blocks of random bits with scales near SCALE, uint8 (num_experts, out_features, row bytes)."""
    rng = np.random.default_rng(seed)
    shape = (num_experts, out_features)
    if kind in ("F32", "F16", "BF16"):
        w = (rng.standard_normal((*shape, in_features)) * SCALE).astype(np.float32)
        raw = {"F32": w, "F16": w.astype(np.float16), "BF16": (w.view(np.uint32) >> 16)}[kind]
        raw = raw.astype(np.uint16) if kind == "BF16" else raw
        return BlockMatrix(kind, in_features, np.ascontiguousarray(raw).view(np.uint8))
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (*shape, in_features // weights, size), dtype=np.uint8)
    scales = (rng.random((*blocks.shape[:3], 4)) * SCALE + SCALE).astype(np.float16)
    for i, at in enumerate(HALVES.get(kind, ())):
        blocks[..., at : at + 2] = scales[..., i : i + 1].view(np.uint8)
    if kind == "MXFP4":  # 2 ** (e - 128)
        blocks[..., 0] = rng.integers(118, 124, blocks.shape[:3])
    if kind == "IQ1_M":  # its half stands in the high nibbles of four words
        bits = scales[..., 0].view(np.uint16)
        words = np.ascontiguousarray(blocks[..., 48:56]).view(np.uint16)
        for i in range(4):
            words[..., i] = (words[..., i] & 0xFFF) | ((bits >> (4 * i) & 15) << 12)
        blocks[..., 48:56] = words.view(np.uint8)
    return BlockMatrix(kind, in_features, blocks.reshape(*shape, -1))


def random_blocks(
    spec: MoESpec, types: tuple[str, str, str], seed: int = 0, scale_bias: float = 0.1
) -> BlockExperts:
    """Experts of ``spec`` whose gate, up and down have the given types."""
    rng = np.random.default_rng(seed)
    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size

    def bias(n: int) -> np.ndarray | None:
        return (
            (rng.standard_normal((e, n)) * scale_bias).astype(np.float32) if spec.has_bias else None
        )

    return BlockExperts(
        spec,
        random_matrix(types[0], e, i, h, seed + 1) if spec.has_gate else None,
        random_matrix(types[1], e, i, h, seed + 2),
        random_matrix(types[2], e, h, i, seed + 3),
        bias(i) if spec.has_gate else None,
        bias(i),
        bias(h),
    )


class ExactBlocks(ExactExperts):
    """The stated arithmetic on what the kernels' own unpacking finds (test_llamafile holds that against gguf)."""

    def __init__(self, experts: BlockExperts, isa: str) -> None:
        self.spec, self.blocks, self.isa = experts.spec, experts, isa

    def bias(self, expert: int, projection: str) -> np.ndarray | None:
        bias = self.blocks.biases.get(projection)
        return None if bias is None else bias[expert]

    def linear(self, expert: int, projection: str, x: np.ndarray) -> np.ndarray:
        matrix = self.blocks.matrices[projection]
        codes, scales, minima = unpack(matrix, expert, self.isa)
        if scales is None:  # even and odd k apart
            y = [linear_float(codes[:, i::2], x[:, i::2]) for i in range(2)]
            return y[0] + y[1]
        group, k = self.spec.activation_group, matrix.in_features
        fine = k // scales.shape[1]
        act = quantise_activations(x, k, group)
        a = act.codes.astype(np.int64)
        y = np.zeros((len(x), len(codes)), np.float32)
        for c0 in range(0, k, group):
            inner = np.zeros_like(y)
            for f0 in range(c0, min(c0 + group, k), fine):
                some = a[:, f0 : f0 + fine]
                sums = some @ codes[:, f0 : f0 + fine].T.astype(np.int64)
                inner = fma(sums.astype(np.float32), scales[None, :, f0 // fine], inner)
                if minima.any():
                    whole = some.sum(axis=1, keepdims=True).astype(np.float32)
                    inner = fma(whole, minima[None, :, f0 // fine], inner)
            y = fma(inner, act.scales[:, c0 // group, None], y)
        return y


def unpack(
    matrix: BlockMatrix, expert: int, isa: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Codes (out, in), scales and minima (out, groups) of one expert; out_features a multiple of 16."""
    native, index = native_module(), formats()[matrix.type].table_index
    panels = [
        native.unpack_blocks(
            np.ascontiguousarray(matrix.data[expert, p : p + PANEL]), index, matrix.in_features, isa, matrix.is_repacked
        )
        for p in range(0, matrix.data.shape[1], PANEL)
    ]  # fmt: skip
    codes, scales, minima = zip(*panels, strict=True)
    if scales[0] is None:
        return np.concatenate(codes, axis=1).T, None, None
    return tuple(np.concatenate(some, axis=1).T for some in (codes, scales, minima))  # type: ignore[return-value]
