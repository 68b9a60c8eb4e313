"""Heat: recency, and what the router's scores promise of the next uses.

The expert leaves with the smallest

    (place in LRU order, 0 = least recent) / (experts in memory) + lookahead_weight * heat

Source: the MESH proposal of expert residency for KTransformers (pull request 2003, 2026), which
takes the place in the order of any policy.
"""

from __future__ import annotations

import numpy as np

from ktk.placement.residency.heat_map import HeatMap
from ktk.placement.residency.policies.lru import Lru
from ktk.placement.residency.policy import Blocked, Policy, Shape, check_share


class Heat(Lru):
    """gamma, beta, transition_alpha : as HeatMap has them. lookahead_weight : of heat beside
    recency.
    """

    name = "heat"
    wants_scores = True

    def __init__(
        self,
        shape: Shape,
        *,
        gamma: float = 0.7,
        beta: float = 0.5,
        transition_alpha: float = 0.5,
        lookahead_weight: float = 1.0,
    ) -> None:
        super().__init__(shape)
        if lookahead_weight < 0:
            raise ValueError(f"lookahead_weight={lookahead_weight}: must not be negative")
        self._weight = lookahead_weight
        self._map = HeatMap(
            shape.num_layers,
            shape.num_experts,
            check_share("gamma", gamma),
            check_share("beta", beta),
            check_share("transition_alpha", transition_alpha),
        )

    def share(self, first: Policy) -> None:
        assert isinstance(first, Heat)
        self._map = first._map

    def observe(self, layer: int, scores: np.ndarray) -> None:
        self._map.observe(layer, scores)

    def evict(self, is_blocked: Blocked) -> int:
        keys = np.fromiter(self._order, np.int64, len(self._order))
        recency = np.arange(len(keys)) / max(len(keys), 1)
        score = recency + self._weight * self._map.heat(keys)
        while len(keys):
            at = int(score.argmin())
            key = int(keys[at])
            if not is_blocked(key):
                del self._order[key]
                return key
            keys, score = np.delete(keys, at), np.delete(score, at)
        raise LookupError("every expert in memory is in use")
