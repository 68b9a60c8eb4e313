"""Layer shapes of real models, and the routings that calls of a layer get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Shape:
    """One layer. cut_from : the model's own number of experts where num_experts is less, else None.

    Raises ValueError naming the size that does not fit.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    cut_from: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be at most num_experts={self.num_experts}")

    @property
    def num_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size

    def operations(self, num_tokens: int) -> int:
        """Multiplications and additions of a call."""
        return 2 * self.num_weights * self.top_k * num_tokens

    def __str__(self) -> str:
        cut = f" of {self.cut_from}" if self.cut_from else ""
        return (
            f"{self.name}: {self.hidden_size} x {self.intermediate_size}, "
            f"{self.num_experts}{cut} experts, top-{self.top_k}"
        )


# Large models are cut to as many experts as fit 24 GiB in every format: a call of a few tokens
# still reads all its experts from RAM. Biases and shared experts are left out.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
        Shape("deepseek-v3", 7168, 2048, 32, 8, cut_from=256),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2),
        Shape("gpt-oss-120b", 2880, 2880, 32, 4, cut_from=128),
        Shape("kimi-k2", 7168, 2048, 32, 8, cut_from=384),
    )
}


class Routing(NamedTuple):
    """ids : int64 (tokens, top_k), distinct in a row. weights : float32 (tokens, top_k),
    rows sum to 1. touched : experts.
    """

    ids: np.ndarray
    weights: np.ndarray
    touched: int


def routings(shape: Shape, num_tokens: int, count: int, seed: int) -> list[Routing]:
    """``count`` different routings, each expert as likely as any other.

    Those of one token are dealt from a shuffled deck: no expert comes again before all were read.
    """
    rng = np.random.default_rng(seed)
    experts, top_k = shape.num_experts, shape.top_k
    deals = experts // top_k  # whole calls in a deck
    found = []
    for i in range(count):
        if num_tokens == 1:
            if i % deals == 0:
                deck = rng.permutation(experts)
            ids = deck[i % deals * top_k :][None, :top_k].astype(np.int64)
        else:
            order = rng.random((num_tokens, experts)).argsort(axis=1)
            ids = np.ascontiguousarray(order[:, :top_k], np.int64)
        weights = rng.random((num_tokens, top_k), np.float32) + np.float32(0.1)
        weights /= weights.sum(axis=1, keepdims=True)
        found.append(Routing(ids, weights, len(np.unique(ids))))
    return found
