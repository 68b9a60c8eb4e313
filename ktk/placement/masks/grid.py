"""A model's experts, layers by experts, and how many of them a GPU has room for."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class ExpertGrid:
    """Rows of masks and statistics are all layers of the model, dense ones too.

    num_layers : of the model. num_experts : of a layer with experts. moe_layers : indices of those
    layers, ascending. ValueError if they do not fit.
    """

    num_layers: int
    num_experts: int
    moe_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_experts < 1:
            raise ValueError(
                f"num_layers={self.num_layers}, num_experts={self.num_experts}: must be at least 1"
            )
        if list(self.moe_layers) != sorted({n for n in self.moe_layers if n >= 0}) or (
            self.moe_layers and self.moe_layers[-1] >= self.num_layers
        ):
            raise ValueError(
                f"moe_layers={self.moe_layers}: must ascend within 0..{self.num_layers - 1}"
            )
        if not self.moe_layers:
            raise ValueError("no layer has experts: there is nothing to place")

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_layers, self.num_experts

    @property
    def total(self) -> int:
        """Experts of all layers that have some."""
        return len(self.moe_layers) * self.num_experts

    @cached_property
    def rows(self) -> np.ndarray:
        """``moe_layers`` as an index of rows."""
        return np.array(self.moe_layers, np.int64)

    def masks(self, of_moe: np.ndarray) -> np.ndarray:
        """Masks of all layers. of_moe : bool (moe_layers, num_experts). Dense rows are True:
        whoever owns them, they are no work of the CPU's experts.
        """
        found = np.ones(self.shape, np.bool_)
        found[self.rows] = of_moe
        return found

    def check_masks(self, masks: np.ndarray) -> None:
        """ValueError unless bool (num_layers, num_experts)."""
        if masks.dtype != np.bool_ or masks.shape != self.shape:
            raise ValueError(f"masks are {masks.dtype} {masks.shape}: must be bool {self.shape}")

    def check_counts(self, counts: np.ndarray) -> None:
        """ValueError unless (num_layers, num_experts) of finite numbers, none negative."""
        if counts.shape != self.shape:
            raise ValueError(
                f"statistics are of {counts.shape} layers and experts: the model has {self.shape}"
            )
        check_frequency(counts)


def check_frequency(counts: np.ndarray) -> None:
    """ValueError unless real and finite, none negative."""
    if counts.dtype.kind not in "biuf":
        raise ValueError(f"activation counts are {counts.dtype}: must be integers or floats")
    if counts.size and not (np.isfinite(counts).all() and counts.min() >= 0):
        raise ValueError("activation counts must be finite, and none negative")


def num_gpu_experts(
    grid: ExpertGrid,
    *,
    per_layer: int | None = None,
    ratio: float | None = None,
    memory: int | None = None,
    expert_bytes: int = 0,
) -> int:
    """Experts on the GPU, of all layers together, from one of three ways to say it.

    per_layer : of each layer, on average, as SGLang's --kt-num-gpu-experts. ratio : 0..1 of all, as
    its --kt-gpu-experts-ratio. memory : bytes, of which each expert takes ``expert_bytes``.
    ValueError unless exactly one is given and allowed; 0 of each is.
    """
    given = [x for x in (per_layer, ratio, memory) if x is not None]
    if len(given) != 1:
        raise ValueError(
            f"{len(given)} of per_layer, ratio and memory are given: must be exactly one"
        )
    if per_layer is not None:
        if not 0 <= operator.index(per_layer) <= grid.num_experts:
            raise ValueError(
                f"{per_layer} experts of a layer on the GPU: must be 0..{grid.num_experts}, which "
                "is all of a layer"
            )
        return per_layer * len(grid.moe_layers)
    if ratio is not None:
        if not (math.isfinite(ratio) and 0 <= ratio <= 1):
            raise ValueError(f"{ratio} of the experts on the GPU: must be 0..1")
        return int(grid.total * ratio)
    assert memory is not None
    if memory < 0 or expert_bytes < 1:
        raise ValueError(
            f"{memory} bytes for experts of {expert_bytes} bytes: must be at least 0 and 1"
        )
    return min(memory // expert_bytes, grid.total)
