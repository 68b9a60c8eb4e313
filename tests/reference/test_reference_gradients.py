"""The oracle of gradients against finite differences of its own forward pass, in float64, and
against the oracle without adapters.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ktk.experts.activation import Activation
from ktk.experts.lora import ExpertLora
from ktk.experts.spec import MoESpec
from ktk.reference.gradients import LoraOracle, dropout_factor
from ktk.reference.moe import oracle_forward
from make.cases import random_experts
from make.training_cases import ACTIVATIONS, random_call, random_lora

SPEC = MoESpec(5, 10, 7, "fp32", has_bias=True)
CASES = {name: (act, True) for name, act in ACTIVATIONS.items()} | {
    f"{act.kind} without a gate": (act, False)
    for act in (Activation(alpha=1.3), Activation.gelu_tanh(), Activation.relu2())
}


def away_from_corners(spec: MoESpec) -> float:
    """Scale of weights that make z large enough for the bounds to clamp some values."""
    return 1.5 if spec.activation.gate_max < 10 else 0.4


@pytest.mark.parametrize(
    ("name", "dropout"), [*((name, 0.4) for name in CASES), ("silu", 0.0), ("relu2", 0.0)]
)
def test_gradients_are_those_of_finite_differences(name: str, dropout: float) -> None:
    """Along three random directions, to 1e-6 of the gradient's norm: steps of 1e-6 in float64."""
    activation, has_gate = CASES[name]
    spec = dataclasses.replace(SPEC, activation=activation, has_gate=has_gate)
    experts = random_experts(spec, 3, away_from_corners(spec))
    lora = random_lora(spec, 3, dropout=dropout, seed=9)
    hidden, ids, weights, grad = random_call(spec, 4, 3, seed=4)
    oracle = LoraOracle(experts, spec, lora)
    inputs = {"hidden": hidden.astype(float), "weights": weights.astype(float), **oracle.adapters}
    d_hidden, d_weights, d_adapters = oracle.backward(hidden, ids, weights, grad)
    found = {"hidden": d_hidden, "weights": d_weights, **d_adapters}
    assert set(found) == set(inputs)
    rng = np.random.default_rng(8)
    for part, array in inputs.items():
        size = np.linalg.norm(found[part])
        assert size > 0
        for _ in range(3):
            direction, values = rng.standard_normal(array.shape), []
            for sign in (1, -1):
                array += sign * 1e-6 * direction
                out = oracle.forward(inputs["hidden"], ids, inputs["weights"])
                values.append(float((out * grad).sum()))
                array -= sign * 1e-6 * direction
            slope = (values[0] - values[1]) / 2e-6
            assert abs(slope - (found[part] * direction).sum()) <= 1e-6 * size, part


def test_experts_without_tokens_and_foreign_ids_get_exactly_zero() -> None:
    experts, lora = random_experts(SPEC, 3), random_lora(SPEC, 2)
    hidden, ids, weights, grad = random_call(SPEC, 5, 2, seed=4)
    ids[:, 0], ids[:, 1] = 1, [-1, 5, 3, 3, 3]
    _, d_weights, d_adapters = LoraOracle(experts, SPEC, lora).backward(hidden, ids, weights, grad)
    assert not d_weights[:2, 1].any()
    assert d_weights[2:].all()
    for matrix in d_adapters.values():
        assert [bool(e.any()) for e in matrix] == [False, True, False, True, False]


def test_without_adapters_the_oracle_is_that_of_inference() -> None:
    experts = random_experts(SPEC, 3)
    hidden, ids, weights, _ = random_call(SPEC, 5, 2, seed=4)
    ids[0] = ids[0, 0]  # the same expert twice
    got = LoraOracle(experts, SPEC).forward(hidden, ids, weights)
    want = oracle_forward(experts, SPEC, hidden, ids, weights)
    assert np.abs(got - want).max() <= 1e-13 * np.abs(want).max()
    lora = random_lora(SPEC, 2)
    silent = dataclasses.replace(
        lora, **{n: np.zeros_like(a) for n, a in lora.arrays.items() if n.endswith("_b")}
    )
    silent_out = LoraOracle(experts, SPEC, silent).forward(hidden, ids, weights)
    assert np.array_equal(silent_out, got)


def test_dropout_drops_the_part_asked_for_and_keeps_the_mean() -> None:
    lora = ExpertLora(dropout=0.3, seed=5)
    found = np.stack([dropout_factor(lora, pair, False, 400) for pair in range(50)])
    assert set(np.unique(found)) == {0.0, 1 / 0.7}
    assert abs((found == 0).mean() - 0.3) < 0.01  # 20,000 values: 3 sigma
    rows = (found == 0).astype(float) - 0.3
    assert np.abs(np.corrcoef(rows) - np.eye(50)).max() < 0.25  # no pair repeats another's mask
    other = dropout_factor(dataclasses.replace(lora, seed=6), 0, False, 400)
    assert (other != found[0]).any()
    assert (dropout_factor(lora, 0, True, 400) != found[0]).any()
