"""Formats chosen under a budget, against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ktk.convert import allocate as module
from ktk.convert.allocate import allocate


def tried(sizes: np.ndarray, losses: np.ndarray, budget: int) -> float:
    """The least loss within the budget."""
    rows = range(len(sizes))
    return min(
        sum(losses[i, c] for i, c in zip(rows, choice, strict=True))
        for choice in itertools.product(range(sizes.shape[1]), repeat=len(sizes))
        if sum(sizes[i, c] for i, c in zip(rows, choice, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 40, (5, 4)), axis=1) * 96
    losses = np.sort(rng.random((5, 4)), axis=1)[:, ::-1]
    budget = int(rng.integers(sizes.min(axis=1).sum(), sizes.max(axis=1).sum() + 1))
    chosen = allocate(sizes.tolist(), losses.tolist(), budget)
    rows = np.arange(5)
    assert sizes[rows, chosen].sum() <= budget
    assert losses[rows, chosen].sum() == pytest.approx(tried(sizes, losses, budget), rel=1e-12)


def test_steps_that_are_rounded_exceed_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 200)
    rng = np.random.default_rng(3)
    sizes = np.sort(rng.integers(1000, 9000, (5, 4)), axis=1)
    losses = np.sort(rng.random((5, 4)), axis=1)[:, ::-1]
    budget = int(sizes.mean(axis=1).sum())
    chosen = allocate(sizes.tolist(), losses.tolist(), budget)
    spent = sizes[np.arange(5), chosen].sum()
    assert spent <= budget
    step = -(-(budget - int(sizes.min(axis=1).sum())) // 200)
    assert losses[np.arange(5), chosen].sum() <= tried(sizes, losses, budget - 5 * step)


def test_a_budget_below_the_smallest_is_refused() -> None:
    with pytest.raises(ValueError, match="99 bytes: the smallest choices take 100"):
        allocate([[40, 80], [60, 90]], [[1, 0], [1, 0]], 99)
    assert allocate([[40, 80], [60, 90]], [[1, 0], [1, 0]], 100) == [0, 0]
    assert allocate([[40, 80], [60, 90]], [[1, 0], [1, 0]], 10**9) == [1, 1]
