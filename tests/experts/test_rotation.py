"""Rotation: what it is by its definition, that weights and activations are turned alike, and what
it is good for.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ktk.experts.rotation import WIDTHS, Rotation, rotate, rotate_back, sign_bits
from ktk.experts.spec import MoESpec
from ktk.reference.moe import ExactExperts, oracle_forward
from make.cases import assert_exact, pack_all, random_experts, random_routing

F = np.float32


def hadamard(width: int) -> np.ndarray:
    """By Sylvester's rule, divided by the square root of the width."""
    h = np.ones((1, 1))
    while len(h) < width:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", [0, 7])
def test_it_is_signs_then_hadamard_of_each_block(width: int, seed: int) -> None:
    x = np.random.default_rng(width + seed).standard_normal((5, 2 * width)).astype(F)
    bits = [int(sign_bits(seed, 2 * width)[k // 64]) >> k % 64 & 1 for k in range(2 * width)]
    signed = x.astype(np.float64) * (1 - 2 * np.array(bits))
    want = signed.reshape(5, 2, width) @ hadamard(width)
    got = rotate(x, Rotation(width, seed))
    np.testing.assert_allclose(got, want.reshape(5, -1), atol=2e-6)
    np.testing.assert_allclose(rotate_back(got, Rotation(width, seed)), x, atol=2e-6)
    assert 0.4 < np.mean(bits) < 0.6


def test_words_of_signs_are_splitmix64() -> None:
    """Of the state 0 the generator's authors print this output."""
    assert int(sign_bits(0, 64)[0]) == 0xE220A8397B1DCDAF
    assert len({int(w) for w in sign_bits(0, 64 * 512)}) == 512
    assert_exact(sign_bits(3, 256), sign_bits(3, 64 * 100)[:4])
    assert not np.array_equal(sign_bits(3, 256), sign_bits(4, 256))


def test_none_changes_nothing() -> None:
    x = np.ones((2, 32), F)
    assert rotate(x, Rotation()) is x and rotate_back(x, Rotation()) is x


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (32, "the width must be 0, 64 or 256"),
        (True, "the width must be 0, 64 or 256"),
        ("64", "a width, or a width and a seed"),
        ((64, 0, 1), "a width, or a width and a seed"),
        ((64, -1), "the seed must be 0 to"),
        ((64, 1 << 32), "the seed must be 0 to"),
        ((0, 5), "0 without one"),
        ([64, 1.5], "the width must be"),
    ],
)
def test_what_is_none_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoESpec(1, 64, 64, "int8", rotation=given)


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp8", "gguf"])
def test_formats_whose_activations_stay_take_none(name: str) -> None:
    with pytest.raises(ValueError, match="takes 0"):
        MoESpec(1, 64, 64, name, rotation=64)


def test_a_spec_keeps_it_and_an_old_one_has_none() -> None:
    for spec in (MoESpec(1, 64, 64, "int8", rotation=(256, 9)), MoESpec(1, 64, 64, "nl4")):
        assert MoESpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert MoESpec(1, 64, 64, "nl4").turns == (64, 0)
    old = MoESpec(1, 64, 64, "int4").to_json()
    assert "rotation" not in old
    assert MoESpec.from_json({**old, "weight_format": "nl4", "group_size": 16}).turns == (0, 0)


@pytest.mark.parametrize("name", ["int4", "int8", "nl4"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 256), (100, 70), (576, 40)])
def test_decoded_weights_are_turned_back(name: str, hidden: int, intermediate: int) -> None:
    spec = MoESpec(2, hidden, intermediate, name, rotation=64)
    experts = random_experts(spec, 3)
    exact = ExactExperts(pack_all(spec, experts))
    limit = {"int4": 0.12, "int8": 0.012, "nl4": 0.09}[name]
    for expert, weights in enumerate(experts):
        for want, got in zip(weights[:3], exact.dequantised(expert)[:3], strict=True):
            assert np.linalg.norm(want - got) < limit * np.linalg.norm(want)


def test_outliers_of_a_few_channels_cost_less() -> None:
    """Four channels a hundred times the others, one scale for 256 activations."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 512)).astype(F)
    x[:, [3, 100, 300, 500]] *= 100
    ids, weights = random_routing(16, 2, 4, 7)
    errors = {}
    for width in (0, 64, 256):
        spec = MoESpec(4, 512, 256, "int8", activation_group=256, rotation=width)
        experts = random_experts(spec, 5)
        for e in experts:
            for w in (e.gate, e.up):
                assert w is not None
                w[:, [3, 100, 300, 500]] *= 0.01  # as models have it: large inputs, small weights
        want = oracle_forward(experts, spec, x, ids, weights)
        got = ExactExperts(pack_all(spec, experts)).forward(x, ids, weights)
        errors[width] = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert errors[64] < errors[0] / 3
    assert errors[256] < errors[0] / 3
