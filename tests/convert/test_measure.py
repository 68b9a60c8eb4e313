"""What a coding costs in a layer's output, against float64; recipes chosen for bits."""

from __future__ import annotations

import numpy as np
import pytest

from ktk.convert import measure
from ktk.convert.measure import measure_layer
from ktk.convert.recipe import Coding
from ktk.experts.layout import matrix_layout
from ktk.experts.panels import dequantised
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.quantise.feedback import LayerCalibration, LayerInputs, packed_encoder

F = np.float32
SPEC = MoESpec(5, 64, 64)
NAMES = ("gate", "up", "down")


def layer(seed: int) -> tuple[list[ExpertWeights], LayerInputs]:
    """The last expert gets no token, the first most."""
    rng = np.random.default_rng(seed)
    experts = [ExpertWeights(*rng.standard_normal((3, 64, 64)).astype(F) / 8) for _ in range(5)]
    ids = np.minimum(rng.geometric(0.4, (90, 2)) - 1, 3)
    weights = rng.random((90, 2)).astype(F)
    residual = rng.random(90).astype(F) + 0.5
    return experts, LayerInputs(rng.standard_normal((90, 64)).astype(F), ids, weights, residual)


def run(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    x, gate, up, down = (a.astype(np.float64) for a in (x, gate, up, down))
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def test_losses_are_the_change_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RARE", 0.0)
    experts, inputs = layer(0)
    coding = Coding.parse("int4")
    losses, output = measure_layer(
        SPEC, inputs, experts.__getitem__, {n: [coding] for n in NAMES}, 2
    )
    spec = MoESpec(5, 64, 64, "int4")
    calibration, encode = LayerCalibration(spec, inputs), packed_encoder(spec)
    layout = matrix_layout(spec.format, 64, 64, 32, 128)
    exact, squares = np.zeros((90, 64)), {name: np.zeros(90) for name in NAMES}
    for e, weights in enumerate(experts):
        token, slot = np.nonzero(inputs.topk_ids == e)
        x, routing = inputs.hidden[token], inputs.topk_weights[token, slot].astype(np.float64)
        true = run(x, *weights[:3]) * routing[:, None]
        np.add.at(exact, token, true)
        if not len(token):
            continue
        factors = {"gate": calibration.input_factor(x, routing.astype(F))}
        factors["up"] = factors["gate"]
        g = x @ weights.gate.T
        moments = calibration.moments(g / (1 + np.exp(-g)) * (x @ weights.up.T), routing.astype(F))
        factors["down"] = calibration.down_factor(moments, routing.astype(F))
        for name in NAMES:
            w = dequantised(encode(name, getattr(weights, name), factors[name])[0], layout)
            changed = run(x, *weights._replace(**{name: w})[:3]) * routing[:, None] - true
            np.add.at(squares[name], token, np.square(changed).mean(1))
    np.testing.assert_allclose(output, exact, rtol=1e-4, atol=1e-4)
    scale = inputs.residual + np.square(exact).mean(1)
    for name in NAMES:
        assert losses[name][0] == pytest.approx((squares[name] / scale).mean(), rel=1e-3)


def test_fewer_bits_lose_more_and_few_experts_stand_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts, inputs = layer(1)
    tried = [Coding.parse(name) for name in ("nl2", "nl3", "nl4", "int8")]
    codings = dict.fromkeys(NAMES, tried)
    every, _ = measure_layer(SPEC, inputs, experts.__getitem__, codings, 1)
    monkeypatch.setattr(measure, "NUM_EXPERTS", 2)
    monkeypatch.setattr(measure, "MAX_TOKENS", 40)
    some, _ = measure_layer(SPEC, inputs, experts.__getitem__, codings, 1)
    for name in NAMES:
        assert (every[name][:-1] > 2.5 * every[name][1:]).all()
        np.testing.assert_allclose(some[name], every[name], rtol=0.4)
