"""Strategies: which experts a GPU with room for so many should hold.

All but ``optimal`` are those of SGLang's --kt-expert-placement-strategy, mask for mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ktk.placement.masks.costs import Costs, Demand
from ktk.placement.masks.grid import ExpertGrid, check_frequency
from ktk.placement.masks.optimal import optimal_masks

RANDOM_SEED = 42


@dataclass(frozen=True)
class Known:
    """What is known beside the model's shape; each strategy says what it needs.

    counts : (num_layers, num_experts), how often each expert was used, or None. costs, top_k,
    num_tokens : of a step, as ``Demand.of_counts`` takes them.
    """

    counts: np.ndarray | None = None
    costs: Costs | None = None
    top_k: int = 1
    num_tokens: int = 1


def first_of_most(counts: np.ndarray, number: int) -> np.ndarray:
    """bool like ``counts``: the ``number`` largest of all, of equals the first."""
    chosen = np.zeros(counts.size, np.bool_)
    falling = np.argsort(-counts.reshape(-1).astype(np.float64), kind="stable")
    chosen[falling[: max(0, number)]] = True
    return chosen.reshape(counts.shape)


def generate_gpu_experts_masks(activation_freq: Any, num_gpu_experts: int) -> Any:
    """The experts used most, of all layers together, as kt_kernel's function of this name.

    activation_freq : (num_layers, num_experts), array or tensor. num_gpu_experts : of all layers;
    clamped to 0 and all of them.
    Returns bool (num_layers, num_experts), an array, or a CPU tensor if a tensor was given. Layers
    may have unequally many; of equals the first layer's first expert comes first. ValueError for
    other shapes, and for what is negative or not finite.
    """
    is_tensor = isinstance(activation_freq, torch.Tensor)
    counts = activation_freq.detach().cpu().numpy() if is_tensor else np.asarray(activation_freq)
    if counts.ndim != 2:
        raise ValueError(f"activation_freq is {counts.shape}: must be (num_layers, num_experts)")
    check_frequency(counts)
    masks = first_of_most(counts, num_gpu_experts)
    return torch.from_numpy(masks) if is_tensor else masks


def _counts_of(grid: ExpertGrid, known: Known, strategy: str) -> np.ndarray:
    """(moe_layers, num_experts)."""
    if known.counts is None:
        raise ValueError(
            f"{strategy} needs statistics of how often experts are used: record some, or take "
            "another strategy"
        )
    grid.check_counts(known.counts)
    return known.counts[grid.rows]


def _uniform(grid: ExpertGrid, number: int, known: Known) -> np.ndarray:
    layers = len(grid.moe_layers)
    of_layer = number // layers + (np.arange(layers) < number % layers)
    return np.arange(grid.num_experts) < of_layer[:, None]


def _front_loading(grid: ExpertGrid, number: int, known: Known) -> np.ndarray:
    return np.arange(grid.total).reshape(-1, grid.num_experts) < number


def _random(grid: ExpertGrid, number: int, known: Known) -> np.ndarray:
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    order = torch.randperm(grid.total, generator=generator, device="cpu").numpy()
    chosen = np.zeros(grid.total, np.bool_)
    chosen[order[:number]] = True
    return chosen.reshape(-1, grid.num_experts)


def _frequency(grid: ExpertGrid, number: int, known: Known) -> np.ndarray:
    return first_of_most(_counts_of(grid, known, "frequency"), number)


def _optimal(grid: ExpertGrid, number: int, known: Known) -> np.ndarray:
    counts = _counts_of(grid, known, "optimal")
    if known.costs is None:
        raise ValueError("optimal needs the costs of experts: give them, or take frequency")
    demand = Demand.of_counts(counts, known.top_k, known.num_tokens)
    return optimal_masks(demand, known.costs, number).masks


# In the order that tables show them: without statistics first.
STRATEGIES: dict[str, Callable[[ExpertGrid, int, Known], np.ndarray]] = {
    "uniform": _uniform,
    "front-loading": _front_loading,
    "random": _random,
    "frequency": _frequency,
    "optimal": _optimal,
}


def place(grid: ExpertGrid, strategy: str, number: int, known: Known | None = None) -> np.ndarray:
    """The strategy's masks.

    uniform : equally many of each layer, the first layers one more, a layer's first experts.
    front-loading : all of the first layer, then of the next. random : the same for a model always.
    frequency : the most used, of all layers together; needs ``counts``. optimal : those with which
    a step is expected to be shortest; needs ``counts`` and ``costs``.
    number : experts on the GPU, of all layers.
    Returns bool (num_layers, num_experts); rows of layers without experts are True. ValueError for
    an unknown strategy, a number outside 0..all, and what is missing.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
    if not 0 <= number <= grid.total:
        raise ValueError(f"{number} experts on the GPU: must be 0..{grid.total}, which is all")
    return grid.masks(STRATEGIES[strategy](grid, number, known or Known()))
