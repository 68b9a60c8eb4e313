"""Some experts on a device, here torch's "cpu", the rest on ktk: the sums of all on the CPU."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.errors import BackendError
from ktk.experts.spec import MoESpec
from ktk.ops.device_experts import DeviceExperts
from ktk.ops.hybrid import HybridMoE
from ktk.ops.moe import MoE
from ktk.placement.masks.updates import OnlineUpdate, PrefillUpdate
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing

EXPERTS, HIDDEN, INNER, TOP_K = 5, 96, 64, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = {
    "fp32": MoESpec(EXPERTS, HIDDEN, INNER, "fp32", has_bias=True),
    "int8": MoESpec(EXPERTS, HIDDEN, INNER, "int8"),
}
# Of the largest sum: float32 in another order, and activations that the CPU rounds to 8 bits.
ERROR = {"fp32": 2e-6, "int8": 5e-2}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PACKED = {name: pack_all(spec, random_experts(spec, 1)) for name, spec in SPECS.items()}


def hybrid(name: str, mask: Any, **options: Any) -> HybridMoE:
    options = {"device": "cpu", "dtype": torch.float32, **options}
    return HybridMoE(PACKED[name], np.asarray(mask, bool), **options)


def first(number: int) -> np.ndarray:
    return np.arange(EXPERTS) < number


def some_call(tokens: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, weights = random_routing(tokens, TOP_K, EXPERTS, seed)
    hidden = torch.from_numpy(random_hidden(tokens, HIDDEN, seed))
    return hidden, torch.from_numpy(ids), torch.from_numpy(weights)


def assert_close(want: torch.Tensor, got: torch.Tensor, error: float) -> None:
    assert (want.dtype, want.shape, want.device) == (got.dtype, got.shape, got.device)
    scale = float(want.float().abs().max())
    bound = (error + ROUNDING[want.dtype]) * scale
    assert float((want.float() - got.float()).abs().max()) <= bound


def test_all_masks_one_after_the_other() -> None:
    call = some_call(17)
    want = MoE(PACKED["fp32"])(*call)
    for bits in range(1 << EXPERTS):
        mask = bits >> np.arange(EXPERTS) & 1
        assert_close(want, hybrid("fp32", mask)(*call), ERROR["fp32"])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS),
    tokens=st.sampled_from([0, 1, 2, 17]),
    top_k=st.sampled_from([1, 2, EXPERTS]),
    outside=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_mask_has_the_sums_of_the_cpu_alone(
    name: str,
    dtype: torch.dtype,
    mask: list[bool],
    tokens: int,
    top_k: int,
    outside: bool,
    seed: int,
) -> None:
    ids, weights = random_routing(tokens, top_k, EXPERTS, seed)
    if outside and tokens:
        ids[0, 0], ids[-1, -1] = -1, EXPERTS
    hidden = torch.from_numpy(random_hidden(tokens, HIDDEN, seed)).to(dtype)
    call = hidden, torch.from_numpy(ids), torch.from_numpy(weights)
    want, got = MoE(PACKED[name])(*call), hybrid(name, mask)(*call)
    if tokens:
        assert_close(want, got, ERROR[name])
    assert got.shape == hidden.shape


@pytest.mark.parametrize("mask", [np.zeros(EXPERTS, bool), first(2)])
def test_calls_without_an_expert_of_the_device_have_the_bits_of_the_cpu(mask: np.ndarray) -> None:
    hidden, ids, weights = some_call(7)
    ids = torch.where(torch.from_numpy(mask)[ids], 4, ids)
    for dtype in DTYPES:
        call = hidden.to(dtype), ids, weights
        want = MoE(PACKED["int8"])(*call)
        assert torch.equal(want, hybrid("int8", mask)(*call))


def test_sums_are_rounded_once() -> None:
    """Both parts in float32, added, and then rounded: bit by bit."""
    mask = first(3)
    hidden, ids, weights = some_call(40)
    made = hybrid("int8", mask)
    for dtype in DTYPES[1:]:
        x = hidden.to(dtype)
        exact = made(x.float(), ids, weights)  # has the float32 sums
        assert torch.equal(exact.to(dtype), made(x, ids, weights))


def test_the_cpu_does_not_run_experts_of_the_device_and_need_not_have_them() -> None:
    mask = first(2)
    packed = PACKED["int8"]
    few = packed.without(mask)
    assert few.num_stored == EXPERTS - 2
    made = HybridMoE(few, mask, device="cpu", dtype=torch.float32, gpu_experts=packed)
    call = some_call(9)
    assert torch.equal(hybrid("int8", mask)(*call), made(*call))
    with pytest.raises(BackendError, match="experts 0, 1 leave the device .* not in the CPU's"):
        made.swap(~first(3))
    assert torch.equal(hybrid("int8", mask)(*call), made(*call))
    assert np.array_equal(made.mask, mask)
    with pytest.raises(BackendError, match="experts 0 the CPU is to run"):
        HybridMoE(few, np.arange(EXPERTS) == 1, device="cpu", gpu_experts=packed)
    with pytest.raises(BackendError, match="experts 0, 1 the device is to hold"):
        HybridMoE(few, mask, device="cpu")


def test_arrays_and_shapes_with_more_dimensions_are_taken() -> None:
    made = hybrid("int8", first(3))
    hidden, ids, weights = some_call(6)
    want = made(hidden, ids, weights)
    got = made(hidden.numpy(), ids.numpy(), weights.numpy())
    assert isinstance(got, np.ndarray)
    assert_exact(want.numpy(), got)
    assert torch.equal(want, made(hidden.reshape(2, 3, HIDDEN), ids.int(), weights.double()))
    assert_exact(
        made(hidden.half(), ids, weights).numpy(),
        made(hidden.numpy().astype(np.float16), ids.numpy(), weights.numpy()),
    )


def test_a_device_that_works_on_its_own_is_asked_before_the_cpu_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way of CUDA: the CPU's part runs in the caller's thread, behind the device's launch."""
    made, call = hybrid("int8", first(3)), some_call(9)
    want, order = made(*call), []
    launch, run = DeviceExperts.forward, MoE.run

    def noted(name: str, function: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            order.append((name, threading.current_thread().name))
            return function(*arguments)

        return wrapped

    class Elsewhere:
        type = "elsewhere"

    monkeypatch.setattr(DeviceExperts, "forward", noted("device", launch))
    monkeypatch.setattr(MoE, "run", noted("cpu", run))
    monkeypatch.setattr(HybridMoE, "device", Elsewhere())
    monkeypatch.setattr(torch.Tensor, "to", _to_elsewhere(torch.Tensor.to))
    got = made(*call)
    here = threading.current_thread().name
    assert order == [("device", here), ("cpu", here)]
    assert torch.equal(want, got)


def _to_elsewhere(to: Any) -> Any:
    def stay(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        kept = [a for a in arguments if getattr(a, "type", None) != "elsewhere"]
        return to(x, *kept, **named) if kept or named else x

    return stay


def test_an_error_on_either_side_comes_through_and_the_next_call_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, call = hybrid("int8", first(3)), some_call(9)
    want = made(*call)
    for owner, name in ((DeviceExperts, "forward"), (MoE, "run")):

        def fails(*_: Any) -> None:
            raise RuntimeError("as told")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(RuntimeError, match="as told"):
                made(*call)
        assert torch.equal(want, made(*call))
        made.swap(first(2))  # nobody counts as a call any more
        made.swap(first(3))


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.zeros(EXPERTS + 1, bool), r"bool \(6,\): must be bool \(5,\)"),
        (np.zeros(EXPERTS, int), r"int64 \(5,\): must be bool \(5,\)"),
        (None, r"mask is None: must be bool \(5,\)"),
        (np.ones(EXPERTS, bool), "names 5 experts: the device has room for 2"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Any, text: str) -> None:
    made = hybrid("int8", first(2))
    with pytest.raises(ValueError, match=text):
        made.swap(mask)
    if mask is None or not mask.all():
        with pytest.raises(ValueError, match=text):
            HybridMoE(PACKED["int8"], mask, device="cpu")
    assert np.array_equal(made.mask, first(2))


def test_a_swap_without_memory_leaves_the_old_set(monkeypatch: pytest.MonkeyPatch) -> None:
    made, call = hybrid("int8", first(2)), some_call(9)
    want, staged, calls = made(*call), DeviceExperts.staged, []

    def full(self: DeviceExperts, weights: Any) -> Any:
        calls.append(weights)
        if len(calls) == 2:
            raise BackendError("no memory")
        return staged(self, weights)

    monkeypatch.setattr(DeviceExperts, "staged", full)
    with pytest.raises(BackendError, match="no memory"):
        made.swap(~first(3))
    assert np.array_equal(made.mask, first(2))
    assert torch.equal(want, made(*call))


def test_swaps_while_threads_call_show_in_no_result() -> None:
    """Each expert's sum is another's by far: a slot overwritten too early, or an expert that both
    sides or none run, would be seen.
    """
    made = hybrid("fp32", first(2))
    calls = [some_call(tokens, seed) for seed, tokens in enumerate((1, 1, 2, 5, 30))]
    wants = [MoE(PACKED["fp32"])(*call) for call in calls]
    over, failures, counts = threading.Event(), [], [0, 0, 0]

    def work(own: int) -> None:
        try:
            while not over.is_set():
                for call, want in zip(calls, wants, strict=True):
                    assert_close(want, made(*call), ERROR["fp32"])
                    counts[own] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(3)
    for _ in range(300):
        mask = np.zeros(EXPERTS, bool)
        mask[rng.permutation(EXPERTS)[: rng.integers(0, 3)]] = True
        made.swap(mask)
        assert np.array_equal(made.mask, mask)
    over.set()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert min(counts) > 5


def test_an_update_swaps_after_the_call_it_saw() -> None:
    made = hybrid("fp32", first(2), update=PrefillUpdate(8))
    plain = MoE(PACKED["fp32"])
    hidden, ids, weights = some_call(12)
    for few in (hidden[:7], ids[:7], weights[:7]), (hidden[:1], ids[:1], weights[:1]):
        assert_close(plain(*few), made(*few), ERROR["fp32"])
        assert np.array_equal(made.mask, first(2))
    ids[:] = torch.tensor([4, 2])
    assert_close(plain(hidden, ids, weights), made(hidden, ids, weights), ERROR["fp32"])
    assert np.flatnonzero(made.mask).tolist() == [2, 4]
    assert_close(plain(hidden, ids, weights), made(hidden, ids, weights), ERROR["fp32"])
    few_experts = PACKED["fp32"].without(first(2))
    with pytest.raises(BackendError, match="experts 0, 1 may be swapped and are not in the CPU's"):
        HybridMoE(
            few_experts,
            first(2),
            device="cpu",
            gpu_experts=PACKED["fp32"],
            update=PrefillUpdate(8),
        )


def test_updates_of_threads_that_call_at_once_show_in_no_result() -> None:
    made = hybrid("fp32", first(2), update=OnlineUpdate(2.0, 2, 0.0))
    calls = [some_call(tokens, seed) for seed, tokens in enumerate((1, 1, 2, 1, 5))]
    wants = [MoE(PACKED["fp32"])(*call) for call in calls]
    failures, masks = [], set()

    def work(own: int) -> None:
        try:
            for i in range(200):
                at = (i // 20 + own) % len(calls)  # each text goes on for a while
                assert_close(wants[at], made(*calls[at]), ERROR["fp32"])
                masks.add(made.mask.tobytes())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert len(masks) > 3
    assert made.num_on_device == 2


def test_a_forked_child_calls_and_swaps_while_the_parent_does() -> None:
    made, call = hybrid("fp32", first(2)), some_call(3)
    want, over = made(*call), threading.Event()
    torch_threads = torch.get_num_threads()

    def swaps() -> None:
        while not over.is_set():
            made.swap(first(2))
            made.swap(~first(3))

    def calls() -> None:
        while not over.is_set():
            made(*call)

    threads = [threading.Thread(target=target) for target in (swaps, calls)]
    torch.set_num_threads(1)  # torch's own threads do not outlive a fork
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(30)  # a child that waits for ever is killed
                try:
                    for mask in (first(1), ~first(4), first(2)):
                        made.swap(mask)
                        assert_close(want, made(*call), ERROR["fp32"])
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
        torch.set_num_threads(torch_threads)


def test_what_it_is_can_be_read() -> None:
    made = hybrid("int8", first(2), dtype=torch.bfloat16)
    assert repr(made).startswith("HybridMoE(2 of 5 experts on cpu, torch.bfloat16; MoE(5 experts")
