"""What masks are worth: worked out by hand on small traces, and beside what was published."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ktk.placement.masks.costs import Costs
from ktk.placement.masks.published import DYNAMIC, TOKENS_PER_SECOND, agreement, published
from ktk.placement.masks.simulate import ONLINE, SIMULATED, Steps, fitted_costs, simulate, updated
from ktk.placement.masks.workload import Workload, served_trace
from ktk.placement.residency.trace import Trace
from make.cases import assert_exact

SMALL = Workload(num_layers=4, num_experts=32, top_k=4, requests=24, prompt=40, answer=32)
COSTS = Costs(1.0, gpu_expert=0.25, transfer=0.5, rest=2.0)


def trace_of(steps: list[list[list[list[int]]]], num_experts: int) -> Trace:
    """steps : of each layer, of each token, its experts."""
    layers, calls, ids, call = [], [], [], 0
    for step in steps:
        for layer, tokens in enumerate(step):
            layers += [layer] * len(tokens)
            calls += [call] * len(tokens)
            ids += tokens
            call += 1
    chosen = np.array(ids, np.int32)
    return Trace(
        num_layers=len(steps[0]),
        num_experts=num_experts,
        layers=np.array(layers, np.int32),
        calls=np.array(calls),
        tokens=np.zeros(len(layers), np.int64),
        expert_ids=chosen,
        weights=np.ones(chosen.shape, np.float32),
    )


# Counted first: experts 0 and 1. Then a prompt of 2 and 3, and tokens that go there.
DRIFTING = trace_of(
    [
        [[[0], [1]]],
        [[[0]]],
        [[[1]]],
        [[[2], [3], [3]]],
        [[[3]]],
        [[[2]]],
        [[[0]]],
    ],
    num_experts=4,
)


def test_steps_are_counted() -> None:
    steps = Steps.of(trace_of([[[[0, 1], [1, 2]], [[2, -1], [2, 0]]], [[[1, 0]], [[2, 0]]]], 3))
    assert_exact(np.array([[[1, 2, 1], [1, 0, 2]], [[1, 1, 0], [1, 0, 1]]], np.int32), steps.counts)
    assert steps.num_tokens.tolist() == [2, 1]


def test_frequency_keeps_what_was_and_dynamic_follows() -> None:
    found = {
        w.strategy: w
        for w in simulate(Steps.of(DRIFTING), COSTS, [0.5], threshold=3, learned=3 / 7)
    }
    # 3 timed tokens go to experts 3, 2, 0; a layer with experts on the CPU takes at least 0.5.
    assert found["frequency"].hit_rate == pytest.approx(1 / 3)
    assert found["frequency"].tokens_per_second == pytest.approx(3 / (3.5 + 3.5 + 2.5))
    assert found[DYNAMIC].hit_rate == pytest.approx(2 / 3)
    assert found[DYNAMIC].tokens_per_second == pytest.approx(3 / (2.5 + 2.5 + 3.5))


def test_without_and_with_all_experts_on_the_gpu_strategies_are_alike() -> None:
    found = simulate(Steps.of(DRIFTING), COSTS, [0.0, 1.0], threshold=3, learned=3 / 7)
    for worth in found:
        assert worth.hit_rate == worth.ratio
        want = 3 / 10.5 if worth.ratio == 0 else 3 / 6.75
        if worth.strategy != "optimal" or worth.ratio == 0:
            assert worth.tokens_per_second == pytest.approx(want)


def test_online_masks_count_from_the_step_after_the_one_they_saw() -> None:
    """One layer, room for one of 3: expert 0 from what was counted. Then tokens go to 2 for ever:
    after the second its count is more than one use above that of 0.
    """
    calls = [[[[0]]]] * 4 + [[[[2]]]] * 8
    found = simulate(Steps.of(trace_of(calls, 3)), COSTS, [1 / 3], [ONLINE], learned=4 / 12)
    assert found[0].hit_rate == pytest.approx(6 / 8)


def test_an_update_keeps_the_number_of_each_layer() -> None:
    masks = np.array([[True, True, False, False], [False, False, True, False]])
    counts = np.array([[0, 0, 0, 3], [5, 5, 1, 1]])
    assert updated(masks, counts).tolist() == [
        [True, False, False, True],  # of the three unused ones the first
        [True, False, False, False],
    ]


def test_the_published_ordering_comes_out_where_it_is_said_to() -> None:
    """On a skewed, drifting trace: dynamic is best up to half, frequency before it near all."""
    steps = Steps.of(served_trace(Workload()))
    costs = fitted_costs(steps, 53.24, 112.8)
    worths = simulate(steps, costs, [r for r in TOKENS_PER_SECOND if 0 < r < 1])
    speed = {(w.strategy, w.ratio): w.tokens_per_second for w in worths}
    published_ones = [name for name in SIMULATED if name != ONLINE]
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        assert max(published_ones, key=lambda name: speed[name, ratio]) == DYNAMIC
    for ratio in (0.8, 0.9):
        assert speed["frequency", ratio] > speed[DYNAMIC, ratio]
    for ratio in (0.2, 0.4, 0.6, 0.8):
        assert speed["frequency", ratio] > speed["front-loading", ratio]
    for ratio in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert speed[ONLINE, ratio] > speed["frequency", ratio]
        assert (speed[ONLINE, ratio] > speed[DYNAMIC, ratio]) == (ratio >= 0.5)
    same, pairs = agreement(speed)
    assert same / pairs > 0.9


def test_agreement_counts_pairs_that_were_measured_apart() -> None:
    figures = {
        (name, ratio): published(name, ratio) or 0.0
        for ratio in TOKENS_PER_SECOND
        for name in ("random", "uniform", "front-loading", "frequency", DYNAMIC)
    }
    same, pairs = agreement(figures)
    assert same == pairs > 70
    assert agreement({key: -value for key, value in figures.items()}) == (0, pairs)
    assert agreement(dict.fromkeys(figures, 1.0)) == (0, pairs)
    assert len(figures) == 55 and figures["frequency", 0.9] == 107.15
    assert published("optimal", 0.5) is None and published("random", 0.55) is None


def test_fitted_costs_give_the_two_speeds() -> None:
    steps = Steps.of(served_trace(SMALL))
    costs = fitted_costs(steps, 10.0, 40.0)
    none, every = simulate(steps, costs, [0.0, 1.0], ["uniform"])
    assert none.tokens_per_second == pytest.approx(10.0, rel=0.05)
    assert every.tokens_per_second == pytest.approx(40.0, rel=0.05)


def test_a_workload_is_the_same_for_a_seed_and_another_for_another() -> None:
    one, again = served_trace(SMALL), served_trace(SMALL)
    other = served_trace(replace(SMALL, seed=1))
    assert_exact(one.expert_ids, again.expert_ids)
    assert (
        one.expert_ids.shape != other.expert_ids.shape or (one.expert_ids != other.expert_ids).any()
    )


def test_a_workload_is_as_skewed_and_drifting_as_asked_for() -> None:
    def top_half(trace: Trace) -> float:
        uses = np.bincount(trace.expert_ids[trace.layers == 0].reshape(-1), minlength=32)
        return float(np.sort(uses)[16:].sum() / uses.sum())

    flat = replace(SMALL, skew=0.0, subject=0.0)
    assert top_half(served_trace(flat)) < 0.56
    assert top_half(served_trace(replace(flat, skew=1.5))) > 0.8

    def overlap(persistence: float) -> float:
        trace = served_trace(replace(SMALL, at_once=1, skew=0.0, persistence=persistence))
        counts = Steps.of(trace)
        prompts = counts.counts[counts.num_tokens == SMALL.prompt].reshape(SMALL.requests, -1)
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(prompts)]))

    assert overlap(0.0) < 0.2 < 0.6 < overlap(0.95)


def test_prompts_come_whole_and_tokens_together() -> None:
    steps = Steps.of(served_trace(SMALL))
    sizes = np.bincount(steps.num_tokens)
    assert sizes[SMALL.prompt] == SMALL.requests
    assert set(np.flatnonzero(sizes)) == {1, 2, SMALL.prompt}
    assert (steps.counts.sum(axis=2) == (steps.num_tokens * SMALL.top_k)[:, None]).all()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"strategies": ["best"]}, "must be one of uniform"),
        ({"ratios": [1.5]}, "must be 0..1"),
        ({"learned": 1.0}, "must be between 0 and 1"),
        ({"threshold": 1}, "at least 2"),
        ({"learned": 0.01}, "some must be left"),
    ],
)
def test_what_simulate_refuses(asked: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate(Steps.of(DRIFTING), COSTS, **{"ratios": [0.5], **asked})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"top_k": 33}, {"requests": 0}, {"noise": -1.0}, {"persistence": 1.1}]
)
def test_workloads_that_cannot_be_made(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SMALL, **wrong)


def test_speeds_that_cannot_be_fitted() -> None:
    steps = Steps.of(DRIFTING)
    for speeds in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            fitted_costs(steps, *speeds)
    with pytest.raises(ValueError, match="none to decode"):
        fitted_costs(steps, 1.0, 2.0, threshold=1)
