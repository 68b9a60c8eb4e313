"""The states of experts and of slots, and what becomes what."""

from __future__ import annotations

from enum import Enum


class ExpertState(Enum):
    """cold -> prefetching -> resident <-> pinned; resident -> demoting -> cold; and back from
    prefetching to cold if it cannot be read.
    """

    COLD = "cold"  # on the disk only
    PREFETCHING = "prefetching"  # a slot is its own and is being filled
    RESIDENT = "resident"  # calls may use it; without readers it may leave
    PINNED = "pinned"  # resident until it is unpinned
    DEMOTING = "demoting"  # leaving: no call may use it any more


class SlotState(Enum):
    """empty -> loading -> ready -> loading, when another expert takes it; from loading back to
    empty on failure, from ready where memory goes back to the system.
    """

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"


EXPERT_STEPS = {
    ExpertState.COLD: {ExpertState.PREFETCHING},
    ExpertState.PREFETCHING: {ExpertState.RESIDENT, ExpertState.COLD},
    ExpertState.RESIDENT: {ExpertState.PINNED, ExpertState.DEMOTING},
    ExpertState.PINNED: {ExpertState.RESIDENT},
    ExpertState.DEMOTING: {ExpertState.COLD},
}
SLOT_STEPS = {
    SlotState.EMPTY: {SlotState.LOADING},
    SlotState.LOADING: {SlotState.READY, SlotState.EMPTY},
    SlotState.READY: {SlotState.LOADING, SlotState.EMPTY},
}
# As ktk_standing of ktk_arrivals.h has them; its third, OURS, Python never sets itself.
NATIVE_STANDING = {
    ExpertState.COLD: 0,
    ExpertState.RESIDENT: 1,
    ExpertState.PINNED: 1,
    ExpertState.PREFETCHING: 3,
    ExpertState.DEMOTING: 3,
}
