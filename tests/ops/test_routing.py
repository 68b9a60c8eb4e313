"""Routing: the compiled router against its NumPy reference, and what a Router may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk._cy import native_module
from ktk.ops.router import SCORES, Router, route


@st.composite
def routers(draw: Any) -> Router:
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    experts = groups * draw(st.integers(1, 40))
    top_groups = draw(st.integers(1, groups))
    left = experts // groups * top_groups
    correction = None
    if draw(st.booleans()):
        seed = draw(st.integers(0, 1000))
        correction = np.random.default_rng(seed).standard_normal(experts).astype(np.float32)
    return Router(
        experts,
        draw(st.integers(1, min(left, 12))),
        draw(st.sampled_from(SCORES)),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 2.5, 0.125])),
        correction,
        groups,
        top_groups,
        draw(st.integers(1, 3)),
    )


@settings(max_examples=200, deadline=None)
@given(routers(), st.integers(0, 2**31), st.sampled_from([0.05, 1.0, 2.0]))
def test_native_router_is_the_reference(router: Router, seed: int, spread: float) -> None:
    native = native_module()
    if native is None:
        pytest.skip("the compiled extension is not built")
    logits = np.random.default_rng(seed).standard_normal((5, router.num_experts), np.float32)
    logits *= np.float32(spread)  # more, and sigmoids round to the same float32
    want_ids, want = route(router, logits)
    ids, weights = native.route(router, logits)
    assert np.array_equal(ids, want_ids)
    assert np.allclose(weights, want, rtol=2e-5, atol=1e-9)


def test_native_router_takes_the_first_of_equals_and_survives_nan() -> None:
    native = native_module()
    if native is None:
        pytest.skip("the compiled extension is not built")
    router = Router(16, 4, num_groups=4, top_groups=2, best_of_group=2)
    ids, weights = native.route(router, np.zeros((1, 16), np.float32))
    assert ids.tolist() == [[0, 1, 2, 3]] == route(router, np.zeros((1, 16)))[0].tolist()
    assert np.allclose(weights, 1 / 16)
    ids, weights = native.route(router, np.full((1, 16), np.nan, np.float32))
    assert np.isnan(weights).all()
    assert ((ids >= 0) & (ids < 16)).all()


def test_route_by_hand() -> None:
    logits = np.log(np.array([[1, 2, 3, 4]], np.float32))
    ids, weights = route(Router(4, 2), logits)
    assert ids.tolist() == [[3, 2]]
    assert np.allclose(weights, [[0.4, 0.3]])
    ids, weights = route(Router(4, 2, is_normalised=True, scale=2.0), logits)
    assert np.allclose(weights, [[8 / 7, 6 / 7]])
    corrected = Router(4, 1, "sigmoid", correction=np.array([9, 0, 0, 0], np.float32))
    ids, weights = route(corrected, logits)
    assert ids.tolist() == [[0]]
    assert np.allclose(weights, 0.5), "the correction is for the choice alone"
    grouped = Router(4, 1, num_groups=2, top_groups=1, best_of_group=2)
    assert route(grouped, np.array([[3, -9, 2.0, 2.0]]))[0].tolist() == [[0]]
    by_two = Router(4, 1, "sigmoid", num_groups=2, top_groups=1, best_of_group=2)
    assert route(by_two, np.array([[3, -9, 2.0, 2.0]]))[0].tolist() == [[2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "tanh"}, "score='tanh'"),
        ({"num_groups": 3}, "must divide 8"),
        ({"num_groups": 4, "top_groups": 5}, "must be 1..4"),
        ({"top_k": 9}, "must be 1..8"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "must be 1..2"),
        ({"best_of_group": 0}, "at least 1"),
        ({"correction": np.zeros(7)}, r"must be \(8,\)"),
    ],
)
def test_router_refuses_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(**{"num_experts": 8, "top_k": 2, **fields})
