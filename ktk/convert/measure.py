"""What each coding of each matrix costs in a layer's output, on the inputs of a calibration text.

One matrix of an expert is rounded at a time, with the error feedback that a calibrated conversion
has, and the expert run on the tokens it got: the squared change of its output by its routing
weights, over the mean square of the residual behind the layer. Changes of different matrices
and experts hardly have anything in common, so they add up.

A few experts stand for all of a layer, taken evenly by how much of the routing they have. A rare
one counts as if it had RARE of the mean share more: another text will use it more. Where it got no
token it is measured on everybody's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ktk.convert.exact import Read, run_expert, run_layer
from ktk.convert.recipe import Coding, projections_of
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, ExpertWeights
from ktk.quantise.feedback import Factor, LayerCalibration, LayerInputs, calibrated

F = np.float32
NUM_EXPERTS = 8  # measured of a layer
MAX_TOKENS = 512  # that an expert is run on
RARE = 0.25

Losses = dict[str, np.ndarray]  # float64 (codings,), by projection


def measure_layer(
    spec: MoESpec,
    inputs: LayerInputs,
    read: Read,
    codings: Mapping[str, Sequence[Coding]],
    num_threads: int,
) -> tuple[Losses, np.ndarray]:
    """The losses of each projection's codings, and the layer's exact output, float32 (tokens,
    hidden_size).

    spec : its shapes; read : an expert. A loss is the mean over tokens of the squared change of the
    output, over that of the residual behind the layer, if ``inputs`` says the one before.
    """
    shares = np.zeros(spec.num_experts)
    np.add.at(
        shares, inputs.topk_ids.ravel(), np.square(inputs.topk_weights, dtype=np.float64).ravel()
    )
    counts = {e: RARE * shares.mean() + shares[e] for e in range(spec.num_experts)}
    chosen = _spread(shares)
    strata = _strata(shares, chosen)
    layer = _Layer(spec, inputs, codings)
    total = {name: np.zeros(len(codings[name])) for name in projections_of(spec.has_gate)}
    _, output = run_layer(spec, inputs, read, num_threads, lambda *seen: None)
    scale = None if inputs.residual is None else inputs.residual + mean_squares(output)

    def losses(expert: int) -> Losses:
        weights = read(expert)
        if isinstance(weights, CodedExpert):
            weights = weights.dequantised()
        return layer.losses(expert, weights, scale)

    with ThreadPoolExecutor(num_threads) as pool:
        for expert, found in zip(chosen, pool.map(losses, chosen), strict=True):
            for name, values in found.items():
                total[name] += values * sum(counts[e] for e in strata[expert])
    return {name: values / len(inputs.hidden) for name, values in total.items()}, output


def mean_squares(x: np.ndarray) -> np.ndarray:
    """Of each row, float32 (rows,)."""
    squares: np.ndarray = np.square(x).mean(axis=1)
    return squares


def _spread(shares: np.ndarray) -> list[int]:
    """Experts evenly spaced among all, ordered by their shares, the busiest among them."""
    order = np.argsort(-shares, kind="stable")
    count = min(NUM_EXPERTS, len(order))
    return [int(order[len(order) * i // count]) for i in range(count)]


def _strata(shares: np.ndarray, chosen: Sequence[int]) -> dict[int, list[int]]:
    """The experts that each of the chosen stands for, itself and those that follow it in order."""
    order = [int(e) for e in np.argsort(-shares, kind="stable")]
    starts = [order.index(e) for e in chosen] + [len(order)]
    return {e: order[starts[i] : starts[i + 1]] for i, e in enumerate(chosen)}


class _Layer:
    """One layer's experts on the tokens they got."""

    def __init__(
        self, spec: MoESpec, inputs: LayerInputs, codings: Mapping[str, Sequence[Coding]]
    ) -> None:
        self.spec, self.inputs, self.codings = spec, inputs, codings
        every = {_turns(coding) for choices in codings.values() for coding in choices}
        self._calibrations = {
            turns: LayerCalibration(_turned(spec, turns), inputs) for turns in every
        }

    def losses(self, expert: int, weights: ExpertWeights, scale: np.ndarray | None) -> Losses:
        """Of each projection's codings, by unit of squared routing weight.

        scale : float32 (tokens,), what a token's change is a share of.
        """
        token, slot = np.nonzero(self.inputs.topk_ids == expert)
        routing = self.inputs.topk_weights[token, slot]
        if not routing.any():  # everybody's tokens
            token = np.arange(len(self.inputs.hidden))
            routing = np.ones(len(token), F)
        every, all_routing = self.inputs.hidden[token], routing
        if len(token) > MAX_TOKENS:
            kept = np.linspace(0, len(token) - 1, MAX_TOKENS).astype(np.int64)
            token, routing = token[kept], routing[kept]
        x = self.inputs.hidden[token]
        share = np.square(routing, dtype=np.float64)
        if scale is not None:
            share = share / np.maximum(scale[token], 1e-30)
        _, exact = run_expert(weights, x, self.spec.activation)
        factors = _Factors(self._calibrations, weights, every, all_routing)
        found: Losses = {}
        for name, choices in self.codings.items():
            if name not in projections_of(self.spec.has_gate):
                continue
            found[name] = np.empty(len(choices))
            for at, coding in enumerate(choices):
                factor = factors.of(name, _turns(coding))
                values = _rounded(getattr(weights, name), coding, factor)
                rounded = weights._replace(**{name: values})
                changed = run_expert(rounded, x, self.spec.activation)[1] - exact
                square = np.square(changed, dtype=np.float64).mean(axis=1)
                found[name][at] = (square @ share) / float(np.square(routing).sum())
        return found


class _Factors:
    """Of one expert's inputs, by projection and rotation, each made once."""

    def __init__(
        self,
        calibrations: Mapping[Rotation, LayerCalibration],
        weights: ExpertWeights,
        x: np.ndarray,
        routing: np.ndarray,
    ) -> None:
        self._calibrations, self._x, self._routing = calibrations, x, routing
        activation = next(iter(calibrations.values())).spec.activation
        self._h = run_expert(weights, x, activation)[0]
        self._made: dict[tuple[str, Rotation], Factor] = {}

    def of(self, projection: str, turns: Rotation) -> Factor:
        key = "down" if projection == "down" else "up", turns
        if key not in self._made:
            calibration = self._calibrations[turns]
            if projection == "down":
                moments = calibration.moments(self._h, self._routing)
                self._made[key] = calibration.down_factor(moments, self._routing)
            else:
                self._made[key] = calibration.input_factor(self._x, self._routing)
        return self._made[key]


def _rounded(w: np.ndarray, coding: Coding, factor: Factor) -> np.ndarray:
    fmt = coding.format
    group = fmt.default_group if coding.group_size is None else coding.group_size
    return calibrated(w, fmt, factor, group, _turns(coding))[1]


def _turns(coding: Coding) -> Rotation:
    return Rotation.of(coding.format.default_rotation)


def _turned(spec: MoESpec, turns: Rotation) -> MoESpec:
    """The same shapes in a format that rotates so."""
    named = "int8" if turns.width else "fp32"
    return dataclasses.replace(
        spec, weight_format=named, group_size=None, activation_group=None, rotation=turns
    )
