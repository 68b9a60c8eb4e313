"""The mask of the shortest step, beside a try of every mask."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.placement.masks.costs import Costs, Demand, step_seconds
from ktk.placement.masks.optimal import optimal_masks


def seconds_by_hand(demand: Demand, mask: np.ndarray, costs: Costs) -> float:
    """Expert by expert, as the module's text says."""
    total = costs.rest
    for layer, on_gpu in enumerate(mask):
        cpu = 0.0 if on_gpu.all() else costs.transfer
        gpu = 0.0
        for expert, is_there in enumerate(on_gpu):
            used, pairs = demand.used[layer, expert], demand.pairs[layer, expert]
            if is_there:
                gpu += used * costs.gpu_expert + pairs * costs.gpu_token
            else:
                cpu += used * costs.cpu_expert + pairs * costs.cpu_token
        total += max(cpu, gpu)
    return total


def least_of_all(demand: Demand, costs: Costs, number: int) -> float:
    layers, experts = demand.used.shape
    best = np.inf
    for bits in itertools.product([False, True], repeat=layers * experts):
        if sum(bits) <= number:
            mask = np.array(bits).reshape(layers, experts)
            best = min(best, seconds_by_hand(demand, mask, costs))
    return best


seconds = st.floats(0, 10).map(lambda x: round(x, 3))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (1, 7), (2, 4), (3, 3), (4, 2)]),
    cpu=seconds,
    cpu_token=seconds,
    gpu=seconds,
    gpu_token=seconds,
    transfer=seconds,
    num_tokens=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_no_mask_is_better(
    shape: tuple[int, int],
    cpu: float,
    cpu_token: float,
    gpu: float,
    gpu_token: float,
    transfer: float,
    num_tokens: int,
    seed: int,
    data: st.DataObject,
) -> None:
    layers, experts = shape
    number = data.draw(st.integers(0, layers * experts))
    top_k = data.draw(st.integers(1, experts))
    costs = Costs(cpu, cpu_token, gpu, gpu_token, transfer, rest=0.5)
    counts = np.random.default_rng(seed).integers(0, 20, shape)
    demand = Demand.of_counts(counts, top_k, num_tokens)
    found = optimal_masks(demand, costs, number, tolerance=0)
    least = least_of_all(demand, costs, number)
    assert found.masks.sum() <= number
    assert found.seconds == pytest.approx(least, rel=1e-9, abs=1e-12)
    assert seconds_by_hand(demand, found.masks, costs) == pytest.approx(found.seconds)
    assert found.bound == pytest.approx(least, rel=1e-9, abs=1e-12)  # proven


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(0, 12), gpu=st.sampled_from([0.02, 0.5, 1.0]))
def test_a_search_cut_short_says_how_far_off_it_may_be(seed: int, number: int, gpu: float) -> None:
    counts = np.random.default_rng(seed).integers(1, 1000, (1, 12))
    demand = Demand.of_counts(counts, 3, 1)
    costs = Costs(1.0, gpu_expert=gpu, transfer=0.05)
    exact = optimal_masks(demand, costs, number, tolerance=0, most_choices=10**6)
    rough = optimal_masks(demand, costs, number, tolerance=0, most_choices=4)
    assert rough.bound <= exact.seconds * (1 + 1e-12)
    assert exact.seconds <= rough.seconds * (1 + 1e-12)


def test_slow_gpus_get_few_experts_though_all_would_fit() -> None:
    demand = Demand.of_counts(np.ones((1, 8)), 8, 1)  # every expert in every step
    found = optimal_masks(demand, Costs(1.0, gpu_expert=3.0), 8)
    assert found.masks.sum() == 2  # 6 beside 6; with 1 or 3 it is 7 or 9
    assert found.seconds == pytest.approx(6.0)


def test_a_whole_layer_saves_its_transfer() -> None:
    demand = Demand.of_counts(np.ones((2, 4)), 1, 1)
    found = optimal_masks(demand, Costs(0.1, gpu_expert=0.001, transfer=5.0), 4)
    assert sorted(found.masks.sum(axis=1).tolist()) == [0, 4]


def test_a_large_model_is_near_its_bound() -> None:
    rng = np.random.default_rng(3)
    demand = Demand.of_counts(rng.lognormal(0, 1, (24, 128)), 8, 4)
    costs = Costs(100e-6, gpu_expert=30e-6, transfer=20e-6)
    for number in (300, 2000, 3072):
        found = optimal_masks(demand, costs, number)
        assert found.bound <= found.seconds <= found.bound * 1.002


def test_demand_of_tokens_that_choose_independently() -> None:
    demand = Demand.of_counts(np.array([[3, 1, 0, 0], [0, 0, 0, 0]]), 1, 2)
    assert demand.used[0].tolist() == pytest.approx([1 - 0.25**2, 1 - 0.75**2, 0, 0])
    assert demand.pairs[0].tolist() == pytest.approx([1.5, 0.5, 0, 0])
    assert demand.pairs[1].tolist() == pytest.approx([0.5] * 4)  # nothing known: all alike


def test_step_seconds_is_the_sum_by_hand() -> None:
    rng = np.random.default_rng(0)
    costs = Costs(1.0, 0.2, 0.3, 0.1, 0.4, 0.7)
    demand = Demand.of_counts(rng.integers(0, 9, (3, 5)), 2, 3)
    for _ in range(20):
        mask = rng.random((3, 5)) < 0.6
        assert step_seconds(demand, mask, costs) == pytest.approx(
            seconds_by_hand(demand, mask, costs)
        )


def test_costs_by_bandwidth() -> None:
    costs = Costs.of_bandwidths(1000, 100.0, 500.0, 0.25, 1.0)
    assert (costs.cpu_expert, costs.gpu_expert, costs.transfer, costs.rest) == (10, 2, 0.25, 1)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_seconds_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="transfer="):
        Costs(1.0, transfer=wrong)


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Costs.of_bandwidths(1000, 0.0, 1.0)
    with pytest.raises(ValueError, match="top_k=9"):
        Demand.of_counts(np.ones((1, 8)), 9, 1)
    with pytest.raises(ValueError, match="number=-1"):
        optimal_masks(Demand.of_counts(np.ones((1, 8)), 1, 1), Costs(1.0), -1)
