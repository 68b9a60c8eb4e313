"""How soon experts are used again, by what the router's scores promise.

Of each layer and expert, with every observed call of the layer:

    token_heat = gamma * score + (1 - gamma) * max(global_average, prior)
    global_average = beta * token_heat + (1 - beta) * global_average
    prior = (1 - gamma) * prior

A transition matrix from each layer to the next learns, with weight transition_alpha, which scores
follow which; the scores of a layer times its matrix are the next layer's prior. An expert's heat is
max(token_heat, prior).

Source: the MESH proposal of expert residency for KTransformers (pull request 2003, 2026).
"""

from __future__ import annotations

import numpy as np

TRANSITIONS = 16  # experts of a layer, those of the highest scores, that count for the next


class HeatMap:
    """gamma, beta, transition_alpha : weights of what is new, each between 0 and 1."""

    def __init__(
        self, num_layers: int, num_experts: int, gamma: float, beta: float, transition_alpha: float
    ) -> None:
        self.num_layers = num_layers
        self._gamma, self._beta, self._alpha = gamma, beta, transition_alpha
        self._heat = np.zeros((num_layers, num_experts), np.float32)
        self._average = np.zeros((num_layers, num_experts), np.float32)
        self._prior = np.zeros((num_layers, num_experts), np.float32)
        pairs = max(num_layers - 1, 0)
        self._transitions = np.zeros((pairs, num_experts, num_experts), np.float32)
        self._before: tuple[int, np.ndarray, np.ndarray] | None = None  # layer, experts, weights

    def observe(self, layer: int, scores: np.ndarray) -> None:
        """scores : float32 (num_experts,), none negative, of a call of the layer."""
        known = np.maximum(self._average[layer], self._prior[layer])
        self._heat[layer] = self._gamma * scores + (1 - self._gamma) * known
        self._average[layer] += self._beta * (self._heat[layer] - self._average[layer])
        self._prior[layer] *= 1 - self._gamma
        if self._before is not None and self._before[0] == layer - 1:
            _, experts, weights = self._before
            rows = self._transitions[layer - 1, experts]
            step = self._alpha * weights[:, None]
            self._transitions[layer - 1, experts] = rows + step * (_normal(scores) - rows)
        top = np.argsort(-scores, kind="stable")[:TRANSITIONS]
        top = top[scores[top] > 0]
        weights = _normal(scores[top])
        self._before = layer, top, weights
        if layer + 1 < self.num_layers:
            self._prior[layer + 1] = weights @ self._transitions[layer, top]

    def heat(self, keys: np.ndarray) -> np.ndarray:
        """float32, of the experts with these keys."""
        flat: np.ndarray = np.maximum(self._heat.reshape(-1)[keys], self._prior.reshape(-1)[keys])
        return flat


def _normal(scores: np.ndarray) -> np.ndarray:
    """The same, with the sum 1; zeros stay."""
    total = float(scores.sum())
    return scores / total if total > 0 else scores
