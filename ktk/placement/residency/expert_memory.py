"""How much memory a model's experts may take, as people ask for it, and what fits into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktk.experts.layout import EXPERT_ALIGN, round_up
from ktk.placement.residency.capacity import parse_capacity
from ktk.placement.residency.policies import find_policy
from ktk.placement.residency.pools import PoolOptions


@dataclass(frozen=True)
class ExpertMemory:
    """What a model that is larger than memory is opened with.

    limit : "8GiB" or "500MB" of memory, "25%" of all experts, or "200" of them; at least what one
    token uses. policy, parameters : who stays, as in PoolOptions. ValueError for a limit of another
    form, and for a policy that there is not or that must know the future.
    """

    limit: str
    policy: str = PoolOptions.policy
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if find_policy(self.policy).is_offline:
            raise ValueError(f"residency policy {self.policy}: knows the future, for replays")
        parse_capacity(self.limit, 1, 1)  # for its check

    @classmethod
    def of(cls, given: ExpertMemory | str | int | None) -> ExpertMemory | None:
        """From a limit as it is written, or a number of experts; None stays None."""
        return cls(str(given)) if isinstance(given, str | int) else given

    def room(self, expert_bytes: Sequence[int], num_experts: Sequence[int], top_k: int) -> Room:
        """What fits. expert_bytes, num_experts : of each layer. top_k : experts that one token uses
        in a layer.

        ValueError, with the figure that would do, if not even one token's experts fit.
        """
        slot_bytes, total = round_up(max(expert_bytes), EXPERT_ALIGN), sum(num_experts)
        capacity = parse_capacity(self.limit, total, slot_bytes)
        least = sum(min(top_k, many) for many in num_experts)
        if capacity < least:
            raise ValueError(
                f"expert memory {self.limit}: has room for {capacity} of {total} experts, and one "
                f"token uses {top_k} in each of {len(num_experts)} layers: give at least {least}, "
                f"or {-(-least * slot_bytes // (1 << 20))}MiB"
            )
        return Room(capacity, total, slot_bytes)

    def options(self, capacity: int) -> PoolOptions:
        """What ``Slots`` takes, with room for so many experts."""
        return PoolOptions(capacity, self.policy, dict(self.parameters))


@dataclass(frozen=True)
class Room:
    """capacity : experts that are in memory, of num_experts. slot_bytes : of each."""

    capacity: int
    num_experts: int
    slot_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.capacity * self.slot_bytes
