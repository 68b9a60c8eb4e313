"""Who is in memory: one pool over all layers, or one for each, and a policy that chooses.

Not thread-safe: its owner has a lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ktk.placement.residency.policies import make_policy
from ktk.placement.residency.policies.belady import Belady
from ktk.placement.residency.policy import Policy, Shape


@dataclass(frozen=True)
class PoolOptions:
    """How experts share the room.

    capacity : experts in memory, of all layers together. policy : a name or alias of
    ``policies.POLICIES``; parameters : that policy's. is_per_layer : a pool for each layer, of
    equal size; else one pool, in which no layer is pushed below min_per_layer experts by another.
    """

    capacity: int
    policy: str = "lrfu"
    parameters: dict[str, Any] = field(default_factory=dict)
    is_per_layer: bool = False
    min_per_layer: int = 0


def check_capacity(options: PoolOptions, num_layers: int, num_experts: int, top_k: int) -> None:
    """ValueError, with the figure that would work, if not even one token's experts fit.

    Below that most experts leave a pool in LRU order before their layer's turn comes again.
    """
    least = num_layers * min(top_k, num_experts)
    if options.capacity < least:
        raise ValueError(
            f"room for {options.capacity} experts: one token uses {min(top_k, num_experts)} in "
            f"each of {num_layers} layers; must be at least {least}"
        )
    if options.min_per_layer < 0 or (options.is_per_layer and options.min_per_layer):
        raise ValueError(
            f"min_per_layer={options.min_per_layer}: must be at least 0, and 0 with a pool for "
            "each layer"
        )
    most = (options.capacity - top_k) // max(num_layers - 1, 1)
    if min(options.min_per_layer, num_experts) > most and options.min_per_layer:
        raise ValueError(
            f"min_per_layer={options.min_per_layer} of {num_layers} layers and room for "
            f"{options.capacity} experts: must be at most {min(most, num_experts)}"
        )


class Pools:
    """The experts of a model that are in memory. ValueError as ``check_capacity``.

    top_k : experts that one token uses in a layer.
    """

    def __init__(self, options: PoolOptions, num_layers: int, num_experts: int, top_k: int) -> None:
        check_capacity(options, num_layers, num_experts, top_k)
        self.options = options
        self.num_layers, self.num_experts = num_layers, num_experts
        self.capacity = min(options.capacity, num_layers * num_experts)
        if options.is_per_layer:
            each, more = divmod(self.capacity, num_layers)
            self._sizes = [each + (layer < more) for layer in range(num_layers)]
        else:
            self._sizes = [self.capacity]
        self._policies = [
            make_policy(options.policy, Shape(size, num_layers, num_experts), options.parameters)
            for size in self._sizes
        ]
        for policy in self._policies[1:]:
            policy.share(self._policies[0])
        self._resident = np.zeros(num_layers * num_experts, bool)
        self._of_layer = [0] * num_layers  # how many are in memory
        self._total = 0

    @property
    def is_one(self) -> bool:
        """One pool of all layers."""
        return not self.options.is_per_layer

    def room(self, layer: int) -> int:
        """The most experts of the layer that can be in memory at once."""
        if self.options.is_per_layer:
            return min(self._sizes[layer], self.num_experts)
        others = (self.num_layers - 1) * min(self.options.min_per_layer, self.num_experts)
        return min(self.capacity - others, self.num_experts)

    def space(self, layer: int, idle: list[int]) -> int:
        """How many more experts of the layer can come into memory now.

        idle : of each layer, how many in memory may leave.
        """
        if self.options.is_per_layer:
            return self._sizes[layer] - self._of_layer[layer] + idle[layer]
        least = self.options.min_per_layer
        others = sum(
            max(0, min(can, many - least))
            for other, (can, many) in enumerate(zip(idle, self._of_layer, strict=True))
            if other != layer
        )
        return self.capacity - self._total + idle[layer] + others

    def foresee(self, calls: list[tuple[int, list[int]]]) -> None:
        """For policies that know the future: each call's layer and keys.

        Such a bound has no minimum for layers, which could only cost it hits.
        """
        for index, policy in enumerate(self._policies):
            if isinstance(policy, Belady):
                is_own = [not self.options.is_per_layer or layer == index for layer, _ in calls]
                policy.foresee([keys for own, (_, keys) in zip(is_own, calls, strict=True) if own])

    def __contains__(self, key: int) -> bool:
        return bool(self._resident[key])

    def __len__(self) -> int:
        return self._total

    def begin(self, layer: int, keys: list[int], scores: np.ndarray | None) -> None:
        """A call of the layer begins. keys : its experts, each once. scores : float32
        (num_experts,), the router's, or None.
        """
        if scores is not None:
            self._policies[0].observe(layer, scores)
        self._policy(layer).begin(layer, keys)

    def hit(self, key: int) -> None:
        """The call uses an expert that is in memory."""
        self._policy(key // self.num_experts).hit(key)

    def hit_all(self, layer: int, keys: list[int]) -> None:
        """The call uses these experts of the layer, which are in memory."""
        hit = self._policy(layer).hit
        for key in keys:
            hit(key)

    def admit(self, key: int, is_used: Callable[[int], bool]) -> int | None:
        """An expert comes into memory. Returns who leaves for it, None where there was room.

        is_used : whether an expert must not leave now. LookupError, and nothing changes, if none
        may.
        """
        layer = key // self.num_experts
        policy = self._policy(layer)
        victim = None
        if not self.has_empty(layer):
            least = 0 if policy.is_offline else self.options.min_per_layer
            victim = policy.evict(lambda other: self._must_stay(other, layer, least, is_used))
            self._count(victim, -1)
        self.enter(key)
        return victim

    def enter(self, key: int) -> None:
        """An expert comes into memory, where there is room."""
        self._policy(key // self.num_experts).insert(key)
        self._count(key, 1)

    def retire(self, is_used: Callable[[int], bool]) -> int:
        """Who leaves next of the one pool, as nobody has come for it yet. is_used and LookupError
        as in ``admit``.
        """
        least = self.options.min_per_layer
        victim = self._policies[0].evict(lambda key: self._must_stay(key, -1, least, is_used))
        self._count(victim, -1)
        return victim

    def resize(self, change: int) -> None:
        """Room for more experts of the one pool, or, negative, for fewer; it must be empty."""
        self.capacity += change
        self._sizes[0] += change

    def has_empty(self, layer: int) -> bool:
        """Whether one of the layer may come without another leaving."""
        return self._used(layer) < self._sizes[layer if self.options.is_per_layer else 0]

    def discard(self, key: int) -> None:
        """An expert is gone for another reason than room."""
        self._policy(key // self.num_experts).discard(key)
        self._count(key, -1)

    def _policy(self, layer: int) -> Policy:
        return self._policies[layer if self.options.is_per_layer else 0]

    def _used(self, layer: int) -> int:
        return self._of_layer[layer] if self.options.is_per_layer else self._total

    def _count(self, key: int, change: int) -> None:
        self._resident[key] = change > 0
        self._of_layer[key // self.num_experts] += change
        self._total += change

    def _must_stay(self, key: int, layer: int, least: int, is_used: Callable[[int], bool]) -> bool:
        own = key // self.num_experts
        return is_used(key) or (own != layer and self._of_layer[own] <= least)
