"""Adapters of one layer's experts: low-rank matrices beside the packed ones, which stay as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ktk.experts.spec import MoESpec

MAX_RANK = 128


@dataclass(frozen=True)
class ExpertLora:
    """y = W x + scaling * B (A dropout(x)), for each of the projections that have adapters.

    gate_a, up_a : (num_experts, rank, hidden_size); gate_b, up_b : (num_experts,
        intermediate_size, rank); down_a : (num_experts, rank, intermediate_size); down_b :
        (num_experts, hidden_size, rank). All float32, or all uint16 holding bf16 bits;
        C-contiguous. Both of a pair are None where a projection has no adapters.
    scaling : alpha / rank.
    dropout : of 0 to below 1: the part of A's inputs that counts as zero; the rest is divided by
        1 - dropout. seed : uint32; tells which, the same in forward and backward.
    """

    gate_a: np.ndarray | None = None
    gate_b: np.ndarray | None = None
    up_a: np.ndarray | None = None
    up_b: np.ndarray | None = None
    down_a: np.ndarray | None = None
    down_b: np.ndarray | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    @property
    def pairs(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """A and B of each projection that has them."""
        named = {
            "gate": (self.gate_a, self.gate_b),
            "up": (self.up_a, self.up_b),
            "down": (self.down_a, self.down_b),
        }
        return {n: (a, b) for n, (a, b) in named.items() if a is not None and b is not None}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The matrices there are, by name (``gate_a`` ...), A before B."""
        return {
            f"{name}_{letter}": matrix
            for name, pair in self.pairs.items()
            for letter, matrix in zip("ab", pair, strict=True)
        }

    @property
    def rank(self) -> int:
        """Of every projection; 0 without any."""
        return next((a.shape[1] for a, _ in self.pairs.values()), 0)

    def check(self, spec: MoESpec) -> None:
        """ValueError or TypeError, which names the matrix that does not fit these experts."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed}: must be in 0..{(1 << 32) - 1}")
        if not np.isfinite(self.scaling):
            raise ValueError(f"scaling={self.scaling}: must be finite")
        for name in self._halves():
            raise ValueError(f"{name}_a and {name}_b: one of them is missing")
        if "gate" in self.pairs and not spec.has_gate:
            raise ValueError("gate_a, gate_b: these experts have no gate")
        if not self.pairs:
            return
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank {self.rank}: must be in 1..{MAX_RANK}")
        dtype = next(iter(self.arrays.values())).dtype
        for name, matrix in self.arrays.items():
            self._check_matrix(name, matrix, dtype, spec)

    def _halves(self) -> Iterator[str]:
        for name in ("gate", "up", "down"):
            if (getattr(self, f"{name}_a") is None) != (getattr(self, f"{name}_b") is None):
                yield name

    def _check_matrix(self, name: str, matrix: np.ndarray, dtype: np.dtype, spec: MoESpec) -> None:
        if matrix.dtype != dtype or dtype not in (np.float32, np.uint16):
            raise TypeError(f"{name} is {matrix.dtype}: all must be float32, or all bf16 bits")
        if not matrix.flags.c_contiguous:
            raise ValueError(f"{name} must be C-contiguous")
        want = self.shape(name, spec, self.rank)
        if matrix.shape != want:
            raise ValueError(f"{name} has shape {matrix.shape}: must be {want}")

    @staticmethod
    def shape(name: str, spec: MoESpec, rank: int) -> tuple[int, int, int]:
        """Of the matrix ``gate_a``, ``gate_b`` and so on."""
        columns, rows = spec.hidden_size, spec.intermediate_size
        if name.startswith("down"):
            columns, rows = rows, columns
        return (spec.num_experts, *((rank, columns) if name.endswith("_a") else (rows, rank)))
