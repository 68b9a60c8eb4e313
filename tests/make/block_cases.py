"""The stated arithmetic on GGUF blocks, and what the kernels unpack of them."""

from __future__ import annotations

import numpy as np

from ktk._cy import native_module
from ktk.experts.fma import fma
from ktk.experts.layout import PANEL
from ktk.experts.rows import quantise_activations
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.placement.parts import layout_of
from ktk.reference.linear import linear_float
from ktk.reference.moe import ExactExperts


class ExactBlocks(ExactExperts):
    """The stated arithmetic on what the kernels' own unpacking finds (test_llamafile holds that
    against gguf).
    """

    def __init__(self, experts: StoredExperts, isa: str) -> None:
        self.spec, self.blocks, self.isa = experts.spec, experts, isa

    def bias(self, expert: int, projection: str) -> np.ndarray | None:
        bias = self.blocks.biases.get(projection)
        return None if bias is None else bias[expert]

    def linear(self, expert: int, projection: str, x: np.ndarray) -> np.ndarray:
        matrix = self.blocks.matrices[projection]
        codes, scales, minima = unpack(matrix, expert, self.isa)
        if scales is None or minima is None:  # even and odd k apart
            even, odd = (linear_float(codes[:, i::2], x[:, i::2]) for i in range(2))
            return even + odd
        group, k = self.spec.activation_group, matrix.in_features
        assert group is not None
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
    matrix: StoredMatrix, expert: int, isa: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Codes (out, in), scales and minima (out, groups) of one expert;
    out_features a multiple of 16.
    """
    native, layout = native_module(), layout_of(matrix, 0)
    panels = [
        native.unpack_blocks(
            np.ascontiguousarray(matrix.data[expert, p : p + PANEL]),
            layout,
            isa,
            matrix.is_repacked,
        )
        for p in range(0, matrix.data.shape[1], PANEL)
    ]
    codes, scales, minima = zip(*panels, strict=True)
    if scales[0] is None:
        return np.concatenate(codes, axis=1).T, None, None
    return tuple(np.concatenate(some, axis=1).T for some in (codes, scales, minima))  # type: ignore[return-value]
