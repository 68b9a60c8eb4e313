"""Masks worked out by hand from what SGLang's strategies are, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ktk.placement.masks.costs import Costs
from ktk.placement.masks.grid import ExpertGrid, num_gpu_experts
from ktk.placement.masks.strategies import (
    STRATEGIES,
    Known,
    generate_gpu_experts_masks,
    place,
)

# The first layer is dense; 3 layers of 3 experts.
GRID = ExpertGrid(4, 3, (1, 2, 3))
COUNTS = np.array([[9, 9, 9], [5, 0, 3], [7, 7, 1], [0, 3, 3]])
# torch.randperm(9) of a generator with the seed 42.
SHUFFLED = [6, 4, 0, 7, 5, 8, 3, 2, 1]

GOLDEN = {
    # 5 of 3 layers: 1 each, the first two one more.
    "uniform": {0: "... ... ...", 5: "XX. XX. X..", 7: "XXX XX. XX.", 9: "XXX XXX XXX"},
    "front-loading": {0: "... ... ...", 2: "XX. ... ...", 5: "XXX XX. ...", 9: "XXX XXX XXX"},
    "random": {0: "... ... ...", 3: "X.. .X. X..", 5: "X.. .XX XX.", 9: "XXX XXX XXX"},
    # 7 7 5 3 3 3 1 0 0: of the equal threes the first layer's comes first.
    "frequency": {0: "... ... ...", 2: "... XX. ...", 4: "X.X XX. ...", 7: "X.X XXX .XX"},
}


def rows(text: str) -> list[list[bool]]:
    return [[c == "X" for c in row] for row in text.split()]


@pytest.mark.parametrize(
    ("strategy", "number"), [(s, n) for s, cases in GOLDEN.items() for n in cases]
)
def test_masks_of_a_small_model(strategy: str, number: int) -> None:
    expected = [[True] * 3, *rows(GOLDEN[strategy][number])]
    masks = place(GRID, strategy, number, Known(counts=COUNTS))
    assert masks.dtype == np.bool_
    assert masks.tolist() == expected


def test_every_strategy_but_optimal_has_golden_masks() -> None:
    assert set(GOLDEN) | {"optimal"} == set(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_more_experts_than_asked_for(strategy: str) -> None:
    known = Known(COUNTS, Costs(1.0, 0.1, 1e-3, 1e-4), top_k=2)
    for number in range(GRID.total + 1):
        found = place(GRID, strategy, number, known)[GRID.rows].sum()
        assert found <= number if strategy == "optimal" else found == number


def test_random_is_the_order_of_torch() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(42))
    assert order.tolist() == SHUFFLED


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_function_of_kt_kernel_takes_the_most_used_of_all_layers(as_tensor: bool) -> None:
    freq = np.array([[0.1, 0.9, 0.2], [0.8, 0.05, 0.7]], np.float32)
    masks = generate_gpu_experts_masks(torch.from_numpy(freq) if as_tensor else freq, 3)
    assert isinstance(masks, torch.Tensor) == as_tensor
    assert masks.tolist() == [[False, True, False], [True, False, True]]
    assert masks.dtype == (torch.bool if as_tensor else np.bool_)


@pytest.mark.parametrize(("number", "chosen"), [(-5, 0), (0, 0), (6, 6), (100, 6)])
def test_the_function_of_kt_kernel_clamps_its_number(number: int, chosen: int) -> None:
    assert generate_gpu_experts_masks(np.ones((2, 3)), number).sum() == chosen


def test_of_equals_the_first_is_taken() -> None:
    masks = generate_gpu_experts_masks(np.ones((3, 200), np.int64), 250)
    assert masks.reshape(-1).nonzero()[0].tolist() == list(range(250))


@pytest.mark.parametrize("freq", [np.ones(3), [[1.0, np.nan]], [[1.0, -1.0]], [[1j, 2]]])
def test_the_function_of_kt_kernel_refuses(freq: np.ndarray) -> None:
    with pytest.raises(ValueError, match="activation"):
        generate_gpu_experts_masks(freq, 1)


def test_room_is_said_in_three_ways() -> None:
    assert num_gpu_experts(GRID, per_layer=2) == 6
    assert num_gpu_experts(GRID, ratio=0.5) == 4  # int(4.5)
    assert num_gpu_experts(GRID, memory=1000, expert_bytes=300) == 3
    assert num_gpu_experts(GRID, memory=10**9, expert_bytes=300) == 9
    for nothing in ({"per_layer": 0}, {"ratio": 0.0}, {"memory": 0, "expert_bytes": 1}):
        assert num_gpu_experts(GRID, **nothing) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("room", "says"),
    [
        ({}, "exactly one"),
        ({"per_layer": 1, "ratio": 0.5}, "exactly one"),
        ({"per_layer": -1}, "must be 0..3"),
        ({"per_layer": 4}, "must be 0..3"),
        ({"ratio": 1.01}, "must be 0..1"),
        ({"ratio": -0.1}, "must be 0..1"),
        ({"ratio": float("nan")}, "must be 0..1"),
        ({"memory": -1, "expert_bytes": 1}, "at least 0 and 1"),
        ({"memory": 1}, "at least 0 and 1"),
    ],
)
def test_room_that_is_refused(room: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        num_gpu_experts(GRID, **room)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "number", "known", "says"),
    [
        ("best", 1, Known(), "must be one of uniform"),
        ("uniform", -1, Known(), "must be 0..9"),
        ("uniform", 10, Known(), "must be 0..9"),
        ("frequency", 1, Known(), "needs statistics"),
        ("optimal", 1, Known(), "needs statistics"),
        ("optimal", 1, Known(COUNTS), "needs the costs"),
        ("frequency", 1, Known(COUNTS[1:]), r"are of \(3, 3\).*has \(4, 3\)"),
        ("frequency", 1, Known(-COUNTS), "none negative"),
        ("frequency", 1, Known(COUNTS.astype(str)), "must be integers or floats"),
    ],
)
def test_what_strategies_refuse(strategy: str, number: int, known: Known, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        place(GRID, strategy, number, known)


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (-1,), (4,)])
def test_a_grid_without_sense_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layer"):
        ExpertGrid(4, 3, layers)


def test_masks_are_checked() -> None:
    GRID.check_masks(np.zeros((4, 3), np.bool_))
    for wrong in (np.zeros((4, 3), np.int64), np.zeros((3, 3), np.bool_), np.zeros(12, np.bool_)):
        with pytest.raises(ValueError, match=r"must be bool \(4, 3\)"):
            GRID.check_masks(wrong)
