"""Whole models whose experts come and go: the bits of all experts in memory, to the last token."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ktk.errors import BackendError, CheckpointError
from ktk.integration.transformers import KtkConfig, load_model
from ktk.integration.transformers import linear as linear_layers
from ktk.integration.transformers.decoder_layers import native_calls
from ktk.integration.transformers.experts import find_experts, handle_of
from ktk.integration.transformers.native_batch import NativeModel
from ktk.integration.transformers.sequence import CachedSequence
from ktk.integration.transformers.streaming import expert_slots
from ktk.kv.pool import PagePool
from ktk.machine import cpu
from ktk.ops.streamed import StreamedMoE
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.policies import POLICIES
from ktk.placement.residency.slots import Slots
from make.children import run_python
from make.transformers_cases import FAMILIES, make_model, run

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
ONLINE = [name for name, row in POLICIES.items() if not row.is_offline]
LEAST = {"qwen3_moe": 4, "mixtral": 4, "deepseek_v3": 2, "gpt_oss": 4}  # two layers, top_k 2
FUSED = KtkConfig(linear="file")
TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def small_matrices_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_layers, "SMALLEST", 1)
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed models in bf16, whose decoder layers are fused where they can be."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        wide = (
            dict.fromkeys(("qk_rope_head_dim", "head_dim"), 16) | {"qk_head_dim": 32}
            if family == "deepseek_v3"
            else {}
        )
        make_model(family, torch.bfloat16, **wide).save_pretrained(folder / "float")
        packed = load_model(folder / "float", quantization_config=KtkConfig("int4"))
        packed.save_pretrained(folder / "packed")
        made[family] = folder / "packed"
    return made


def opened(directory: Path, memory: Any = None) -> Any:
    return load_model(directory, quantization_config=FUSED, expert_memory=memory).eval()


def decoded(model: Any) -> list[int]:
    """Greedy tokens as ``ktk run`` makes them, layers fused."""
    made: list[int] = []

    def choose(logits: torch.Tensor) -> int:
        made.append(int(logits.argmax()))
        return made[-1]

    CachedSequence(model).generate(
        list(range(3, 14)), TOKENS, choose, lambda _: False, lambda: False
    )
    return made


def slots_of(model: Any) -> Slots:
    slots = expert_slots(model)
    assert slots is not None
    return slots


@pytest.fixture(scope="module")
def resident(directories: dict[str, Path]) -> dict[str, tuple[torch.Tensor, torch.Tensor, Any]]:
    """Logits, tokens of generate, tokens of fused layers."""
    found = {}
    for family, directory in directories.items():
        model = opened(directory)
        assert expert_slots(model) is None
        found[family] = (*run(model), (decoded(model), native_calls(model)))
    return found


@pytest.mark.parametrize(
    ("family", "policy"),
    [*(("qwen3_moe", policy) for policy in ONLINE), *((family, "lrfu") for family in FAMILIES)],
)
def test_whole_models_have_the_bits_of_all_experts_in_memory(
    family: str, policy: str, directories: dict[str, Path], resident: Any
) -> None:
    model = opened(directories[family], ExpertMemory(str(LEAST[family]), policy))
    want_logits, want_tokens, want_decoded = resident[family]
    logits, tokens = run(model)
    assert torch.equal(want_logits, logits)
    assert torch.equal(want_tokens, tokens)
    assert (decoded(model), native_calls(model)) == want_decoded
    counted = slots_of(model).counters()
    assert counted.hits > 0
    assert counted.evictions > 0
    assert slots_of(model).capacity == LEAST[family]


def test_fused_layers_take_experts_that_come_and_go(
    directories: dict[str, Path], resident: Any
) -> None:
    """Else the test above would compare only what torch decodes."""
    layers_of_tokens = 2 * (TOKENS - 1)
    calls = {family: fused for family, (_, _, (_, fused)) in resident.items()}
    assert calls == dict.fromkeys(FAMILIES, layers_of_tokens)
    model = opened(directories["qwen3_moe"], "25%")
    decoded(model)
    assert native_calls(model) == layers_of_tokens
    assert slots_of(model).counters().reads > 0


def test_decoding_asks_the_next_layers_router_and_keeps_the_bits(
    directories: dict[str, Path], resident: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamedMoE, "come", lambda self: None)  # only decoding reads ahead then
    for family in FAMILIES:
        model = opened(directories[family], str(LEAST[family]))
        assert (decoded(model), native_calls(model)) == resident[family][2]
        has_next = len(list(find_experts(model))) > 1
        assert (slots_of(model).counters().prefetches > 0) == has_next, family


def test_threads_over_one_model_wait_for_each_other_and_give_the_bits(
    directories: dict[str, Path], resident: Any
) -> None:
    """Fused calls have the thread pool while they bring experts, and room is for one token's."""
    model = opened(directories["qwen3_moe"], "4")
    want = resident["qwen3_moe"][2][0]
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(decoded(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "calls wait for each other"
    assert found == [want] * 4


def test_an_expert_that_cannot_be_read_ends_its_call_alone(
    directories: dict[str, Path], resident: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(directories["qwen3_moe"], "5")
    assert decoded(model) == resident["qwen3_moe"][2][0]
    slots, real = slots_of(model), slots_of(model).reader.read

    def fail(layer: int, expert: int, span: Any) -> None:
        raise CheckpointError(f"layer {layer} expert {expert}: Input/output error")

    monkeypatch.setattr(slots.reader, "read", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        decoded(model)
    monkeypatch.setattr(slots.reader, "read", real)
    assert decoded(model) == resident["qwen3_moe"][2][0]


def test_a_copy_shares_the_slots(directories: dict[str, Path], resident: Any) -> None:
    model = opened(directories["mixtral"], "50%")
    twin = copy.deepcopy(model)
    assert slots_of(twin) is slots_of(model)
    assert torch.equal(run(twin)[0], resident["mixtral"][0])


def test_a_model_that_is_dropped_takes_its_slots_along(directories: dict[str, Path]) -> None:
    import weakref

    model = opened(directories["qwen3_moe"], "50%")
    run(model)
    slots = weakref.ref(slots_of(model))
    before = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("ktk-expert-reader") for name in before)
    del model
    gc.collect()
    assert slots() is None


def test_room_below_one_tokens_experts_is_refused_with_what_would_do(
    directories: dict[str, Path],
) -> None:
    with pytest.raises(ValueError, match=r"room for 3 of 16 experts.*give at least 4, or 1MiB"):
        opened(directories["qwen3_moe"], "3")
    with pytest.raises(ValueError, match="must be a number of experts"):
        opened(directories["qwen3_moe"], "lots")
    with pytest.raises(ValueError, match="knows the future"):
        ExpertMemory("4", "belady")


def test_experts_that_are_packed_while_they_load_are_refused(
    directories: dict[str, Path],
) -> None:
    folder = directories["qwen3_moe"].parent / "float"
    with pytest.raises(ValueError, match="ktk convert"):
        load_model(folder, expert_memory="50%")


def test_such_a_model_says_why_it_cannot_be_saved(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    model = opened(directories["mixtral"], "50%")
    with pytest.raises(BackendError, match="without a limit of expert memory"):
        model.save_pretrained(tmp_path / "copy")
    for _, module in find_experts(model):
        handle = handle_of(module)
        assert handle is not None
        assert "Streamed" in repr(handle.moe)


FORKED = """
import os, signal, sys, threading
import torch
from ktk.integration.transformers import KtkConfig, load_model, linear
from ktk.integration.transformers.streaming import expert_slots
torch.set_num_threads(1)  # its other threads are not in a child
linear.SMALLEST = 1
model = load_model(sys.argv[1], quantization_config=KtkConfig(linear="file"), expert_memory="5")
ids = torch.arange(3, 14)[None]

def logits():
    with torch.no_grad():
        return model(ids).logits

want, over = logits(), threading.Event()

def work():
    while not over.is_set():
        assert torch.equal(want, logits())

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(4):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        reads = expert_slots(model).counters().reads
        same = torch.equal(want, logits())
        os._exit(0 if same and expert_slots(model).counters().reads > reads else 1)
    assert os.waitpid(child, 0)[1] == 0
over.set()
for thread in threads:
    thread.join()
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_forked_amid_reads_have_the_bits_and_read_themselves(
    directories: dict[str, Path],
) -> None:
    """And the process ends by itself, its reading threads with it."""
    assert "same" in run_python(FORKED, str(directories["qwen3_moe"]))


def test_a_servers_batch_with_more_experts_than_fit_has_the_same_bits(
    directories: dict[str, Path],
) -> None:
    """A pass of 40 rows uses all 8 experts of each layer, room is for 4: rows go in halves."""
    found = []
    for memory in (None, "4"):
        model = opened(directories["qwen3_moe"], memory)
        decoded(model)  # what its layers compute is tried then
        native = NativeModel(model)
        pool = PagePool(4, native.shapes, native.dtype)
        tables = [pool.tables([pool.take() or 0]) for _ in range(2)]
        rows = [(i % 2, i // 2) for i in range(40)]  # two sequences of 20 tokens in turns
        sequence, position = map(list, zip(*rows, strict=True))
        found.append(native.forward(list(range(3, 43)), sequence, position, tables, [38, 39])[0])
        native.close()
    assert slots_of(model).room(0) == 4
    assert torch.equal(*found)
