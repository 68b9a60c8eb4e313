"""KTMoEWrapper(max_resident_experts=): experts that come and go give the bits of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ktk
from ktk.checkpoint.packed import write_layer
from ktk.errors import BackendError
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.ops.streamed import StreamedMoE
from make.cases import pack_all, random_experts
from make.gguf_families import family_file
from make.gguf_files import EXPERTS, HIDDEN, INTERMEDIATE
from make.wrapper_cases import E, H, K, N, assert_same_bits, make, random_weights, routed

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, spec = tmp_path_factory.mktemp("packed"), MoESpec(E, H, N, "int8")
    write_layer(folder, spec, 0, np.asarray(pack_all(spec, random_experts(spec, 3)).spans))
    return folder


def opened(directory: Path, most: int | None, **more: Any) -> ktk.KTMoEWrapper:
    wrapper = make(weight_path=directory, max_resident_experts=most, **{"method": "auto", **more})
    wrapper.load_weights()
    return wrapper


@pytest.mark.parametrize("most", range(K, E + 2))
def test_every_room_gives_the_bits_of_all_in_memory(directory: Path, most: int) -> None:
    mask = np.arange(E) == 1
    whole, some = (opened(directory, n, gpu_experts_mask=mask) for n in (None, most))
    assert isinstance(some.moe, StreamedMoE)
    assert some.moe.slots.capacity == min(most, E)
    for tokens in (1, 1, 7, 1, 40, 1):
        call = routed(tokens, seed=tokens)
        assert_same_bits(whole.forward(*call), some.forward(*call))
        some.submit_forward(*call)
        assert_same_bits(whole.forward(*call), some.sync_forward(call[0]))
    used = some.moe.slots.counters()
    assert used.reads >= min(most, E - 1)  # nobody asks for the GPU's


def test_blocks_of_a_gguf_file(tmp_path: Path) -> None:
    path, _ = family_file(tmp_path / "m.gguf", "qwen3moe")
    shape = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "weight_format": None}
    whole, some = (
        ktk.KTMoEWrapper(
            1, **{**shape, **sizes}, method="LLAMAFILE", weight_path=path, max_resident_experts=most
        )
        for most in (None, 2)
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, HIDDEN), np.float32)
    ids = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(9)])
    for wrapper in (whole, some):
        wrapper.load_weights()
    weights = rng.random((9, 2), np.float32)
    assert_same_bits(whole.forward(x, ids, weights), some.forward(x, ids, weights))


def test_what_cannot_come_and_go_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"max_resident_experts={K - 1}"):
        make(weight_path=directory, max_resident_experts=K - 1)
    with pytest.raises(ValueError, match="experts from tensors"):
        make(max_resident_experts=K).load_weights_from_tensors(*random_weights())
    with pytest.raises(ValueError, match="ktk convert"):
        opened(tmp_path, K)
    turned = make(weight_path=directory, max_resident_experts=K, method="auto")
    with pytest.raises(ValueError, match="physical_to_logical_map puts experts elsewhere"):
        turned.load_weights(np.arange(E)[::-1].copy())
    with pytest.raises(ValueError, match="the wrapper"):
        opened(directory, K, weight_format="int4")


def test_buffers_of_a_gpu_want_all_experts_in_memory(directory: Path) -> None:
    wrapper = opened(directory, K)
    room = np.zeros(8 * N * H, np.uint8)
    at = [int(room.ctypes.data)]
    with pytest.raises(BackendError, match="leave out max_resident_experts"):
        wrapper.submit_write_weight_scale_to_buffer(1, 0, at, [0], at, [0])
    whole = opened(directory, None)
    whole.submit_write_weight_scale_to_buffer(1, 0, at, [0], at, [0])
    whole.sync_write_weight_scale_to_buffer()
    assert room.any()


def test_ktransformers_variables_say_the_same(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_MAX_TIER0_EXPERTS", "4")
    assert opened(directory, None).moe.slots.capacity == 4
    monkeypatch.setenv("KT_MAX_RESIDENT_EXPERTS", "3")  # goes before
    monkeypatch.setenv("KT_RESIDENCY_POLICY", " W-TinyLFU ")
    monkeypatch.setenv("KT_RESIDENCY_POLICY_CONFIG", '{"window_share": 0.5}')
    some = opened(directory, None)
    assert (some.moe.slots.capacity, some.moe.slots.report().policy) == (3, "w_tinylfu")
    assert opened(directory, 5).moe.slots.capacity == 5  # the argument goes before
    call = routed(7, seed=7)
    some_result = some.forward(*call)
    monkeypatch.setenv("KT_MAX_RESIDENT_EXPERTS", "1")  # less than one token uses: as many as that
    assert opened(directory, None).moe.slots.capacity == K
    for name in ("KT_MAX_RESIDENT_EXPERTS", "KT_MAX_TIER0_EXPERTS"):
        monkeypatch.setenv(name, "auto")
    whole = opened(directory, None)
    assert not isinstance(whole.moe, StreamedMoE)
    assert_same_bits(whole.forward(*call), some_result)


def test_ktransformers_variables_leave_whole_what_cannot_come_and_go(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_MAX_RESIDENT_EXPERTS", str(K))
    turned = make(weight_path=directory, method="auto")
    turned.load_weights(np.arange(E)[::-1].copy())
    assert not isinstance(turned.moe, StreamedMoE)
    tensors = make()
    tensors.load_weights_from_tensors(*random_weights())
    assert not isinstance(tensors.moe, StreamedMoE)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KT_MAX_RESIDENT_EXPERTS", "many", "must be a number of experts"),
        ("KT_RESIDENCY_POLICY", "best", "must be one of lru"),
        ("KT_RESIDENCY_POLICY", "belady", "knows the future"),
        ("KT_RESIDENCY_POLICY_CONFIG", "[1]", "must be a JSON object"),
        ("KT_RESIDENCY_POLICY_CONFIG", "{", "must be a JSON object"),
    ],
)
def test_variables_that_say_nothing_of_use_are_refused(
    name: str, value: str, says: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_MAX_RESIDENT_EXPERTS", str(K))
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}.*{says}"):
        make(weight_path=directory)
