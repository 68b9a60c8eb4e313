"""Room that goes back to a system short of memory: who leaves, what stays, when it comes again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.placement.residency import shrinking_slots
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.reader import ExpertReader
from ktk.placement.residency.shrinking_slots import ShrinkingSlots
from ktk.placement.residency.states import ExpertState
from ktk.placement.store import ExpertStore

LAYERS, EXPERTS, TOP_K = 4, 6, 2
SPEC = MoESpec(EXPERTS, 64, 64, "int8")


class Marks(ExpertReader):
    """An expert's bytes are its number."""

    def read(self, layer: int, expert: int, span: np.ndarray) -> None:
        span[:] = 1 + layer * EXPERTS + expert

    def close(self) -> None: ...


@pytest.fixture
def slots() -> Iterator[ShrinkingSlots]:
    made = slots_with()
    yield made
    made.close()


def slots_with(**options: bool | int) -> ShrinkingSlots:
    stores = [ExpertStore.absent(SPEC) for _ in range(LAYERS)]
    return ShrinkingSlots(stores, Marks(), PoolOptions(14, "lru", **options), TOP_K)


def use_all(slots: ShrinkingSlots) -> None:
    """Each expert in its turn, with its own bytes."""
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            with slots.using(layer, [expert]):
                key = layer * EXPERTS + expert
                span = slots.memory[slots._slot_of[key], : SPEC.layout.expert_bytes]
                assert (span == 1 + key).all()


def system(root: Path, limit: int, used: int, stall: float = 0.0) -> Path:
    """What the kernel says of a process in a v2 cgroup."""
    folder = root / "sys/fs/cgroup/own"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("0::/own\n")
    (root / "proc/meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 16000 kB\n")
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("inactive_file 0\n")
    (folder / "memory.pressure").write_text(f"some avg10={stall} avg60=0.00 total=1\n")
    return root


def test_room_goes_back_least_recent_first_and_comes_again(slots: ShrinkingSlots) -> None:
    use_all(slots)
    kept = [(2, 5), *((3, e) for e in range(EXPERTS))]
    before = slots.memory[:, 0].copy()
    assert slots.shrink(7) == 6  # as many as one token uses stay
    assert slots.capacity == 8
    assert slots.report().resident == 8
    assert all(slots.state(*expert) is ExpertState.RESIDENT for expert in kept)
    assert slots.state(2, 3) is ExpertState.COLD
    assert (before != 0).all()
    pages = [slot for slot in slots._away if (slots.memory[slot, -64:] == 0).all()]
    assert len(pages) == 6  # zeros: the system has them
    use_all(slots)
    assert slots.report().resident == 8
    assert slots.grow(100) == 6
    use_all(slots)
    assert (slots.capacity, slots.report().resident) == (14, 14)


def test_who_is_used_or_pinned_does_not_leave(slots: ShrinkingSlots) -> None:
    use_all(slots)
    slots.pin(3, range(EXPERTS))
    with slots.using(2, range(EXPERTS)):
        assert slots.shrink(6) == 2  # 14 are there, 12 in use
    assert slots.shrink(6) == 4


@pytest.mark.parametrize("options", [{"is_per_layer": True}, {"min_per_layer": 1}])
def test_room_of_each_layer_stays(options: dict[str, int]) -> None:
    slots = slots_with(**options)
    assert slots.shrink(3) == 0
    slots.close()


def test_a_full_cgroup_takes_room_until_it_is_eased(
    slots: ShrinkingSlots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinking_slots, "STEP", 2)
    limit = 10_000_000
    assert slots.ease(system(tmp_path, limit, int(0.94 * limit))) == 0
    assert slots.ease(system(tmp_path, limit, int(0.96 * limit))) == -2
    assert slots.ease(system(tmp_path, limit, int(0.92 * limit))) == -2  # goes on to 90 %
    assert slots.ease(system(tmp_path, limit, int(0.89 * limit))) == 0
    assert slots.ease(system(tmp_path, limit, int(0.80 * limit))) == 2
    assert slots.ease(system(tmp_path, limit, int(0.50 * limit))) == 2
    assert slots.ease(system(tmp_path, limit, int(0.50 * limit))) == 0
    assert slots.ease(system(tmp_path, limit, int(0.50 * limit), stall=30.0)) == -2
    assert slots.ease(tmp_path / "no system") == 0


def test_stalls_are_the_cgroups_own_or_the_systems(tmp_path: Path) -> None:
    system(tmp_path, 10, 5, stall=12.5)
    (tmp_path / "proc/pressure").mkdir()
    (tmp_path / "proc/pressure/memory").write_text("some avg10=3.00 avg60=0.00 total=1\n")
    assert cpu.memory_stall(tmp_path) == 12.5
    (tmp_path / "sys/fs/cgroup/own/memory.pressure").unlink()  # as with cgroups v1
    assert cpu.memory_stall(tmp_path) == 3.0
    assert cpu.memory_stall(tmp_path / "nothing") == 0.0
