"""Least-stale: who was used in the present pass over the layers stays before who was not.

A pass is what one token, or one batch, does: the layers in their order. Stale counts the passes
since the last use; of equally stale experts that one leaves whose layer's turn is farthest off.
The idea, to evict stale experts before those of the present pass, is that of D. Hoang, A. Jaiswal,
M. Samragh, M. Cho, "SpecMD: A comprehensive study on speculative expert prefetching", 2026; the
order among stale ones is ours, in the spirit of S. Angelopoulos, L. Marchal, A. Obrecht,
B. Simon, "Cache management for mixture-of-experts LLMs", 2025.
"""

from __future__ import annotations

from ktk.placement.residency.policy import Blocked, Policy, Shape


class LeastStale(Policy):
    name = "least-stale"
    aliases = ("least_stale", "leaststale")

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._layer, self._pass = -1, 0
        # Of each layer who is in memory, with the pass of the last use; least recent first.
        self._last: list[dict[int, int]] = [{} for _ in range(shape.num_layers)]

    def begin(self, layer: int, keys: list[int]) -> None:
        self._pass += layer <= self._layer
        self._layer = layer

    def hit(self, key: int) -> None:
        of_layer = self._last[key // self.shape.num_experts]
        del of_layer[key]
        of_layer[key] = self._pass

    def insert(self, key: int) -> None:
        self._last[key // self.shape.num_experts][key] = self._pass

    def evict(self, is_blocked: Blocked) -> int:
        found = None
        for step in range(self.shape.num_layers):  # from the layer just left, backwards
            layer = (self._layer - 1 - step) % self.shape.num_layers
            key = next((key for key in self._last[layer] if not is_blocked(key)), None)
            if key is not None and (found is None or self._last[layer][key] < found[0]):
                found = self._last[layer][key], key
        if found is None:
            raise LookupError("every expert in memory is in use")
        self.discard(found[1])
        return found[1]

    def discard(self, key: int) -> None:
        del self._last[key // self.shape.num_experts][key]
