"""Pools: who shares room with whom, and what capacity is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ktk.placement.residency.policies import POLICIES
from ktk.placement.residency.pools import PoolOptions, Pools, check_capacity
from ktk.placement.residency.replay import replay
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace

LAYERS, EXPERTS, TOP_K = 4, 12, 3
TRACE = synthetic_trace(Synthetic(LAYERS, EXPERTS, TOP_K, num_tokens=150, prompt=20, drift=30))
CALLS = list(TRACE.each_call())
each_policy = pytest.mark.parametrize("name", POLICIES)


def use(pools: Pools, layer: int, experts: list[int]) -> list[int | None]:
    """One call; who left."""
    keys = [layer * pools.num_experts + e for e in experts]
    pools.begin(layer, keys, None)
    left = []
    for key in keys:
        if key in pools:
            pools.hit(key)
        else:
            left.append(pools.admit(key, keys.__contains__))
    return left


def test_a_pool_for_each_layer_never_takes_another_layers_room() -> None:
    pools = Pools(PoolOptions(7, is_per_layer=True), 3, 4, 2)
    assert [pools.room(layer) for layer in range(3)] == [3, 2, 2]
    assert use(pools, 0, [0, 1]) == use(pools, 1, [0, 1]) == [None, None]
    assert use(pools, 0, [2, 3]) == [None, 0]
    assert use(pools, 1, [2]) == [4]
    assert 5 in pools
    assert len(pools) == 5


def test_no_layer_is_pushed_below_its_minimum_by_another() -> None:
    pools = Pools(PoolOptions(6, "lru", min_per_layer=2), 2, 8, 2)
    use(pools, 0, [0, 1])
    for e in range(8):
        use(pools, 1, [e])
    assert sum(key in pools for key in range(8)) == 2
    assert pools.room(1) == 4
    free = Pools(PoolOptions(6, "lru"), 2, 8, 2)
    use(free, 0, [0, 1])
    for e in range(8):
        use(free, 1, [e])
    assert sum(key in free for key in range(8)) == 0


REFUSED = {
    "token": (PoolOptions(11), "one token uses 3 in each of 4 layers; must be at least 12"),
    "minimum": (PoolOptions(20, min_per_layer=6), "must be at most 5"),
    "negative": (PoolOptions(20, min_per_layer=-1), "must be at least 0"),
    "both": (PoolOptions(20, is_per_layer=True, min_per_layer=2), "0 with a pool for each layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_figure_that_would(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_capacity(options, LAYERS, EXPERTS, TOP_K)


def test_the_figures_that_the_refusals_name_work() -> None:
    for options in (PoolOptions(12), PoolOptions(20, min_per_layer=5), PoolOptions(1000)):
        assert replay(TRACE, options, CALLS).total.uses == sum(len(c.keys) for c in CALLS)


@each_policy
@pytest.mark.parametrize("is_per_layer", [False, True], ids=["one pool", "per layer"])
def test_belady_is_a_bound_and_all_that_fits_stays(name: str, is_per_layer: bool) -> None:
    before = -1
    for capacity in (30, 36, 48):
        options = PoolOptions(capacity, name, is_per_layer=is_per_layer)
        bound = PoolOptions(capacity, "belady", is_per_layer=is_per_layer)
        found = replay(TRACE, options, CALLS).total
        assert found.uses == sum(len(call.keys) for call in CALLS)
        if capacity > 30 or not is_per_layer:  # there the prompt goes in waves
            assert found.hits <= replay(TRACE, bound, CALLS).total.hits
        assert found.hits >= before
        before = found.hits
    used = len({key for call in CALLS for key in call.keys})
    assert found.misses == used
    assert found.evictions == 0


@each_policy
@pytest.mark.parametrize("minimum", [0, 3])
def test_calls_larger_than_the_room_go_in_waves(name: str, minimum: int) -> None:
    """A prompt uses all 12 experts of a layer; room is for 12 and less."""
    capacity = 12 + minimum
    found = replay(TRACE, PoolOptions(capacity, name, min_per_layer=minimum), CALLS)
    assert found.total.uses == sum(len(call.keys) for call in CALLS)
    assert found.total.evictions >= found.total.misses - capacity


def test_layers_add_up() -> None:
    found = replay(TRACE, PoolOptions(20), CALLS)
    assert found.total.hits == sum(c.hits for c in found.layers)
    assert found.total.misses == sum(c.misses for c in found.layers)
    assert all(0 < c.hit_rate < 1 for c in found.layers)


def test_pools_of_one_model_share_what_heat_learns() -> None:
    """Layer 0's scores have foretold layer 1's expert 3: it stays, though it is least recent."""
    options = PoolOptions(4, "heat", is_per_layer=True)
    pools = Pools(options, 2, 6, 2)
    scores = np.zeros(6, np.float32)
    scores[0] = 1
    foretold = np.zeros(6, np.float32)
    foretold[3] = 1
    for _ in range(4):
        pools.begin(0, [0], scores)
        pools.begin(1, [9], foretold)
    for key in (9, 10):
        pools.admit(key, lambda other: False)
    pools.begin(0, [0], scores)
    assert pools.admit(11, lambda other: False) == 10
