"""LRFU: recency and frequency in one figure, a count of uses that fades.

With each call of its layer an expert's figure is multiplied by 1 - alpha; a use adds alpha. The
lowest leaves. alpha near 1 is LRU, near 0 LFU. It is ``baseline`` with another alpha, the one that
was best on traces (bench/RESULTS.md).
Source: D. Lee, J. Choi, J.-H. Kim, S. H. Noh, S. L. Min, Y. Cho, C. S. Kim, "LRFU: A spectrum of
policies that subsumes the least recently used and least frequently used policies", 2001.
"""

from __future__ import annotations

from typing import ClassVar

from ktk.placement.residency.policies.baseline import Baseline
from ktk.placement.residency.policy import Shape


class Lrfu(Baseline):
    """alpha : weight of the newest call."""

    name = "lrfu"
    aliases: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: Shape, *, alpha: float = 0.2) -> None:
        super().__init__(shape, alpha=alpha)
