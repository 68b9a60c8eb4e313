"""Every policy chooses as its model does; Belady's is the fewest misses there can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.placement.residency.policies import POLICIES, find_policy, make_policy
from ktk.placement.residency.policy import Shape
from ktk.placement.residency.pools import PoolOptions, Pools
from make.residency_models import MODELS, Model, fewest_misses

ONLINE = [name for name, row in POLICIES.items() if not row.is_offline]
LAYERS, EXPERTS = 3, 6
online = pytest.mark.parametrize("name", ONLINE)


def scores_of(calls: list[list[int]]) -> list[dict[int, float]]:
    """Some for each key of each call, exact in float32."""
    rng = np.random.default_rng(len(calls))
    return [{key: float(rng.integers(1, 65)) / 64 for key in keys} for keys in calls]


def present_of_call(
    pools: Pools, layer: int, keys: list[int], scores: np.ndarray | None
) -> list[int]:
    """The keys that were in memory when a call of them came; then all are."""
    pools.begin(layer, keys, scores)
    present = [key for key in keys if key in pools]
    for key in present:
        pools.hit(key)
    for key in keys:
        if key not in present:
            pools.admit(key, keys.__contains__)
    return present


def run_both(
    name: str, capacity: int, calls: list[list[int]], num_layers: int, num_experts: int
) -> None:
    """After each call the same experts are in memory, by policy and by model.

    calls : keys, each call's of one layer.
    """
    pools = Pools(PoolOptions(capacity, name), num_layers, num_experts, 1)
    model: Model = MODELS[name](capacity, num_layers, num_experts)
    for number, (keys, scores) in enumerate(zip(calls, scores_of(calls), strict=True)):
        layer = keys[0] // num_experts
        want_hits = model.call(layer, keys, scores)
        row = np.zeros(num_experts, np.float32)
        for key in keys:
            row[key % num_experts] = scores[key]
        assert len(present_of_call(pools, layer, keys, row)) == want_hits
        found = {key for key in range(num_layers * num_experts) if key in pools}
        assert found == model.resident, f"call {number}"
        assert len(pools) == len(found) <= capacity


@st.composite
def passes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A capacity, and calls layer by layer, of up to four experts each."""
    capacity = draw(st.integers(4, 14))
    experts = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4, unique=True)
    tokens = draw(st.lists(st.tuples(experts, experts, experts), min_size=2, max_size=25))
    calls = [
        [layer * EXPERTS + e for e in sorted(keys)]
        for token in tokens
        for layer, keys in enumerate(token)
    ]
    return capacity, calls


@online
@settings(max_examples=50, deadline=None)
@given(case=passes())
def test_a_policy_chooses_as_its_model(name: str, case: tuple[int, list[list[int]]]) -> None:
    run_both(name, *case, LAYERS, EXPERTS)


@online
def test_a_policy_chooses_as_its_model_over_a_long_skewed_run(name: str) -> None:
    """3000 uses of 40 keys, so that counts are halved and ghosts come back."""
    rng = np.random.default_rng(7)
    popular = 1 / np.arange(1, 41)
    keys = rng.choice(
        40, 3000 if name not in ("heat", "baseline", "lrfu") else 300, p=popular / popular.sum()
    )
    run_both(name, 10, [[int(key)] for key in keys], 1, 40)


def test_every_online_policy_has_a_model() -> None:
    assert set(ONLINE) == set(MODELS)


@settings(max_examples=40, deadline=None)
@given(
    capacity=st.integers(2, 4),
    calls=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True), min_size=1, max_size=12
    ),
)
def test_belady_has_the_fewest_misses_of_all_ways(capacity: int, calls: list[list[int]]) -> None:
    assert misses("belady", capacity, calls) == fewest_misses(calls, capacity)


def misses(name: str, capacity: int, calls: list[list[int]]) -> int:
    pools = Pools(PoolOptions(capacity, name), 1, 6, 1)
    pools.foresee([(0, keys) for keys in calls])
    count = 0
    for keys in calls:
        count += len(keys) - len(present_of_call(pools, 0, keys, None))
    return count


# Worked out by hand: keys used one by one, and who leaves ("." nobody).
GOLDEN = {
    # 1 2 3 fill; 1 is used again, so 2 is the least recent, then 3.
    "lru": (3, "1231425", "....23" + "1"),
    # A1in should hold 1, a quarter of 4: the oldest of those used once leaves. 1 comes back from
    # A1out into Am, so that 3 leaves for 6.
    "2q": (4, "1234516", "....123"),
    # 1 is protected by its second use; 2, 3 and 4 leave from probation in their order.
    "slru": (3, "11234561", "...." + "234."),
    # The paper's idea: 1 has its bit, the hand clears it and takes 2, and goes on from there: 3.
    "sieve": (3, "1231456", "....234"),
    # Small holds 1 of 3. 1 has two uses: it goes into main, 2 leaves; then 3, then 4.
    "s3fifo": (3, "111234561", ".....234" + "."),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_run(name: str) -> None:
    capacity, uses, leaving = GOLDEN[name]
    pools = Pools(PoolOptions(capacity, name), 1, 10, 1)
    found = ""
    for use in uses:
        key = int(use)
        pools.begin(0, [key], None)
        if key in pools:
            pools.hit(key)
            found += "."
        else:
            victim = pools.admit(key, lambda other: False)
            found += "." if victim is None else str(victim)
    assert found == leaving


def test_lru_over_all_layers_hits_nothing_where_much_less_than_a_token_fits() -> None:
    calls = [[layer * 4 + e for e in (0, 1)] for _ in range(5) for layer in range(3)]
    model = MODELS["lru"](4, 3, 4)
    assert sum(model.call(keys[0] // 4, keys, {}) for keys in calls) == 0
    with pytest.raises(ValueError, match=r"one token uses 2 in each of 3 layers; .* at least 6"):
        Pools(PoolOptions(5), 3, 4, 2)


@online
def test_when_all_are_blocked_nothing_changes(name: str) -> None:
    policy = make_policy(name, Shape(3, 1, 8))
    for key in range(3):
        policy.begin(0, [key])
        policy.insert(key)
    with pytest.raises(LookupError):
        policy.evict(lambda key: True)
    assert sorted(policy.evict(lambda key: False) for _ in range(3)) == [0, 1, 2]


@online
def test_a_discarded_expert_is_not_chosen(name: str) -> None:
    policy = make_policy(name, Shape(4, 1, 8))
    for key in range(4):
        policy.begin(0, [key])
        policy.insert(key)
    policy.hit(2)
    policy.discard(2)
    policy.discard(0)
    assert sorted(policy.evict(lambda key: False) for _ in range(2)) == [1, 3]
    with pytest.raises(LookupError):
        policy.evict(lambda key: False)


def test_names_aliases_and_case_find_a_policy() -> None:
    for given_name, name in {
        " LRU ": "lru",
        "Default": "baseline",
        "legacy": "baseline",
        "ema_hotset": "baseline",
        "two-q": "2q",
        "S3-FIFO": "s3fifo",
        "wtinylfu": "w_tinylfu",
        "least_stale": "least-stale",
    }.items():
        assert find_policy(given_name) is POLICIES[name]
    with pytest.raises(ValueError, match="'mru': must be one of lru, 2q, slru, .*belady"):
        find_policy("mru")


WRONG = {
    "unknown": ("lru", {"alpha": 1}, "alpha is unknown; it takes no parameters"),
    "misspelt": ("2q", {"a1": 1}, "it takes a1_share, ghost_share"),
    "text": ("slru", {"protected_share": "much"}, "must be a number"),
    "share": ("slru", {"protected_share": 1.0}, "must lie between 0 and 1"),
    "promote": ("s3fifo", {"promote_at": 4}, "promote_at <= most_uses"),
    "decay": ("w_tinylfu", {"decay_every": 0}, "at least 1"),
    "weight": ("heat", {"lookahead_weight": -1}, "not be negative"),
}


@pytest.mark.parametrize("case", WRONG)
def test_parameters_that_do_not_fit_are_refused(case: str) -> None:
    name, parameters, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make_policy(name, Shape(8, 1, 8), parameters)


def test_a_parameter_changes_what_is_chosen() -> None:
    """Of 2Q: with a larger queue for those used once, one that came back leaves first."""
    chosen = []
    for a1_share in (0.25, 0.9):
        policy = make_policy("2q", Shape(4, 1, 10), {"a1_share": a1_share})
        for key in (0, 1, 2, 3):
            policy.insert(key)
        back = policy.evict(lambda key: False)
        policy.insert(back)
        chosen.append(policy.evict(lambda key: False))
    assert chosen == [1, 0]
