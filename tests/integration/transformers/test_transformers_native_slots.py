"""Decoder layers that bring experts without Python: the bits, the books, and reads that fail."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ktk.checkpoint.packed import layer_path
from ktk.errors import CheckpointError
from ktk.integration.transformers import KtkConfig, load_model
from ktk.integration.transformers import linear as linear_layers
from ktk.integration.transformers.sequence import CachedSequence
from ktk.integration.transformers.streaming import expert_slots
from ktk.machine import cpu
from ktk.ops.streamed import StreamedMoE, Visit
from ktk.placement.residency import native_slots
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.native_slots import NativeSlots
from ktk.placement.residency.states import ExpertState
from make.transformers_cases import make_model

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
FUSED = KtkConfig(linear="file")
TOKENS, EXPERTS = 40, 8  # of each of two layers, of which a token uses two


@pytest.fixture(scope="module", autouse=True)
def decoded_by_layers_that_miss() -> Iterator[None]:
    """Small matrices too, much is offered, and prompts do not read ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_layers, "SMALLEST", 1)
        patch.setattr(native_slots, "OFFERED_SHARE", 3)
        patch.setattr(StreamedMoE, "come", lambda self: None)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    make_model("qwen3_moe", torch.bfloat16).save_pretrained(folder / "float")
    packed = load_model(folder / "float", quantization_config=KtkConfig("int4"))
    packed.save_pretrained(folder / "packed")
    return folder / "packed"


def opened(directory: Path, memory: Any) -> Any:
    return load_model(directory, quantization_config=FUSED, expert_memory=memory).eval()


def decoded(model: Any) -> list[int]:
    made: list[int] = []

    def choose(logits: torch.Tensor) -> int:
        # No text repeats itself: another token uses other experts.
        made.append(int(logits.argsort()[-1 - len(made) % 5]))
        return made[-1]

    CachedSequence(model).generate(
        list(range(3, 14)), TOKENS, choose, lambda _: False, lambda: False
    )
    return made


@pytest.fixture(scope="module")
def tokens(directory: Path) -> list[int]:
    return decoded(opened(directory, None))


def slots_of(model: Any) -> NativeSlots:
    slots = expert_slots(model)
    assert isinstance(slots, NativeSlots)
    assert slots.arrivals is not None
    return slots


def check(slots: NativeSlots) -> None:
    """What the books must say once nothing runs, beside what the operators' tables say."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with slots._changed:
            if not slots._in_flight:
                break
        time.sleep(0.001)
    with slots._changed:
        used, here = slots._slot_of, (ExpertState.RESIDENT, ExpertState.PINNED)
        assert not any(slots._readers)
        assert len(set(used.values())) == len(used)
        empty = slots.arrivals.num_offered - len(slots._offered)
        assert len(used) + len(slots._free) + empty == slots.capacity
        assert len(slots._pools) == len(used) - len(slots._offered)
        for key, state in enumerate(slots._experts):
            layer, expert = divmod(key, EXPERTS)
            assert (key in used) == (state in here)
            ready = slots.arrivals.READY if state in here else slots.arrivals.COLD
            assert slots.arrivals.standing[key] == ready
            span = slots.memory[used[key]].ctypes.data if key in used else 0
            native = slots.arrivals.address(layer, expert)
            assert native == (slots._stores[layer].address(expert) or 0) == span
        for layer in range(2):
            keys = range(layer * EXPERTS, (layer + 1) * EXPERTS)
            assert slots._idle[layer] == sum(slots._is_idle(key) for key in keys)
        counted = slots._counters
        assert counted.uses == counted.hits + counted.cold + counted.in_flight
        assert counted.evictions <= counted.reads + counted.failures + counted.cancelled


@pytest.mark.parametrize(("room", "policy"), [("6", "s3fifo"), ("10", "lrfu"), ("16", "lrfu")])
def test_layers_bring_most_experts_themselves_and_the_bits_stay(
    room: str, policy: str, directory: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [0], Visit.bring

    def bring(self: Visit, *call: Any) -> bool:
        asked[0] += 1
        return real(self, *call)

    monkeypatch.setattr(Visit, "bring", bring)
    model = opened(directory, ExpertMemory(room, policy))
    slots = slots_of(model)
    assert decoded(model) == tokens
    before, asked[0] = slots.counters(), 0
    assert decoded(model) == tokens
    check(slots)
    after = slots.counters()
    calls = 2 * (TOKENS - 1)
    assert after.uses - before.uses >= 2 * calls  # the books know of all
    assert asked[0] < calls / 2
    if room != "16":
        assert after.reads > before.reads
        assert after.evictions > before.evictions


def test_a_policy_that_looks_at_scores_is_asked_at_each_call(directory: Path) -> None:
    slots = expert_slots(opened(directory, ExpertMemory("10", "heat")))
    assert slots is not None
    assert slots.arrivals is None


def test_threads_that_miss_at_once_have_the_bits(directory: Path, tokens: list[int]) -> None:
    model, found = opened(directory, "6"), []
    threads = [threading.Thread(target=lambda: found.append(decoded(model))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "calls wait for each other"
    assert found == [tokens] * 3
    check(slots_of(model))


def test_a_file_cut_short_ends_calls_with_its_name_until_it_is_whole_again(
    directory: Path, tokens: list[int], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(directory, own)
    model = opened(own, "6")
    assert decoded(model) == tokens
    files = [layer_path(own, layer) for layer in range(2)]
    whole = [file.read_bytes() for file in files]
    for file in files:
        with file.open("r+b") as there:
            there.truncate(8192)
    with pytest.raises(CheckpointError, match="truncated"):
        decoded(model)
    for file, content in zip(files, whole, strict=True):
        with file.open("r+b") as there:
            there.write(content)
    assert decoded(model) == tokens
    check(slots_of(model))


def test_a_prompt_of_2048_tokens_reads_each_expert_once(directory: Path) -> None:
    """In chunks of 512 it would read them four times: there is room for half of a layer's."""
    model = opened(directory, "8")
    slots = slots_of(model)
    with slots._changed:
        slots._changed.wait_for(lambda: not slots._in_flight, 20)
    before = slots.counters().reads
    ids = [3 + i % 200 for i in range(2048)]
    CachedSequence(model).generate(ids, 1, lambda _: 5, lambda _: False, lambda: False)
    assert slots.counters().reads - before <= 2 * EXPERTS
