"""A layer's experts with the weights as a checkpoint has them, on what a calibration text gives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ktk.experts.activation import Activation
from ktk.experts.formats.floats import to_f32
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, ExpertWeights
from ktk.quantise.feedback import LayerInputs
from ktk.quantise.pack import check_expert

F = np.float32
T = TypeVar("T")
Read = Callable[[int], ExpertWeights | CodedExpert]


def run_expert(
    weights: ExpertWeights, x: np.ndarray, activation: Activation
) -> tuple[np.ndarray, np.ndarray]:
    """What comes to down, float32 (tokens, intermediate_size), and out of it, (tokens,
    hidden_size), of x, float32 (tokens, hidden_size).
    """

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ to_f32(getattr(weights, name)).T
        bias = getattr(weights, f"{name}_bias")
        return y if bias is None else y + bias

    gate = None if weights.gate is None else linear("gate", x)
    h = activation.apply(gate, linear("up", x))
    return h, linear("down", h)


def run_layer(
    spec: MoESpec,
    inputs: LayerInputs,
    read: Read,
    num_threads: int,
    visit: Callable[[int, ExpertWeights, np.ndarray, np.ndarray], T],
) -> tuple[list[T], np.ndarray]:
    """Every expert on its tokens: what ``visit`` made of each, and the layer's output, float32
    (tokens, hidden_size).

    visit : called with an expert, its weights, its tokens int64 (n,) and what comes to down,
    float32 (n, intermediate_size), from any thread.
    """
    output = np.zeros((len(inputs.hidden), spec.hidden_size), F)
    made: list[T] = []

    def work(expert: int) -> tuple[np.ndarray, np.ndarray, T]:
        weights = read(expert)
        if isinstance(weights, CodedExpert):
            weights = weights.dequantised()
        check_expert(spec, weights)
        token, slot = np.nonzero(inputs.topk_ids == expert)
        h, rows = run_expert(weights, inputs.hidden[token], spec.activation)
        return (
            token,
            rows * inputs.topk_weights[token, slot, None],
            visit(expert, weights, token, h),
        )

    with ThreadPoolExecutor(num_threads) as pool:
        for token, rows, found in pool.map(work, range(spec.num_experts)):
            np.add.at(output, token, rows)
            made.append(found)
    return made, output
