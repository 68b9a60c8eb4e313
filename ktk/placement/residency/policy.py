"""What a residency policy is: it says which expert in memory leaves when room is needed.

Experts of all layers have one number, their key: layer * num_experts + expert. All of them take
the same room.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

# Whether an expert must stay: a call uses it, or its layer has no more than its minimum.
Blocked = Callable[[int], bool]


@dataclass(frozen=True)
class Shape:
    """A pool's room and whose it is.

    capacity : experts that fit. num_layers, num_experts : of the whole model, for keys.
    """

    capacity: int
    num_layers: int
    num_experts: int

    @property
    def num_keys(self) -> int:
        return self.num_layers * self.num_experts


class Policy(ABC):
    """Told of every use in its order: ``begin`` and ``observe`` once a call, then ``hit`` or
    ``insert`` for each expert of it. Not thread-safe: its owner has a lock.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    wants_scores: ClassVar[bool] = False  # looks at what ``observe`` tells
    is_offline: ClassVar[bool] = False  # it must know the future: for replays only

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def begin(self, layer: int, keys: list[int]) -> None:  # noqa: B027
        """A call of the layer begins that uses these experts, each named once."""

    def observe(self, layer: int, scores: np.ndarray) -> None:  # noqa: B027
        """The router's scores of a call: float32 (num_experts,), the largest over its tokens."""

    def share(self, first: Policy) -> None:  # noqa: B027
        """Keep what is learnt of all layers together with the first of the model's pools, which
        alone is told by ``observe``.
        """

    @abstractmethod
    def hit(self, key: int) -> None:
        """A call uses an expert that is in memory."""

    @abstractmethod
    def insert(self, key: int) -> None:
        """An expert comes into memory; there is room."""

    @abstractmethod
    def evict(self, is_blocked: Blocked) -> int:
        """Chooses an expert in memory that is not blocked; it is gone then.

        LookupError if all are blocked.
        """

    @abstractmethod
    def discard(self, key: int) -> None:
        """An expert is gone for another reason: it could not be read, or its owner dropped it."""


def first_free(keys: Iterable[int], is_blocked: Blocked) -> int:
    """The first key that is not blocked; LookupError if there is none."""
    for key in keys:
        if not is_blocked(key):
            return key
    raise LookupError("every expert in memory is in use")


def share_of(capacity: int, share: float) -> int:
    """That share of the room, one expert at least."""
    return max(1, round(share * capacity))


def check_share(name: str, value: float) -> float:
    """ValueError unless it lies between 0 and 1, neither of them."""
    if not 0 < value < 1:
        raise ValueError(f"{name}={value}: must lie between 0 and 1")
    return value
