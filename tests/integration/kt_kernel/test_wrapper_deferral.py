"""Deferred experts: output(n) = immediate(n) + deferred(n-1), and nothing else's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import ktk
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.machine import queue as fifo
from make.wrapper_cases import K, assert_same_bits, exact, loaded, routed, spy

select = ktk.KTMoEWrapper.select_deferred_experts


@pytest.fixture(autouse=True)
def _no_pending():
    ktk.KTMoEWrapper.clear_buffer_cache()
    yield
    ktk.KTMoEWrapper.clear_buffer_cache()


# -- which are deferred ----------------------------------------------------------------------------


def test_a_token_keeps_its_best_experts_and_those_another_token_keeps():
    ids = np.int64([[0, 1, 2], [3, 2, 4]])
    scores = np.float32([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    now, later = select(ids, scores, 1)
    assert now.tolist() == [[0, -1, 2], [-1, 2, -1]]  # the second token protects expert 2 for both
    assert later.tolist() == [[-1, 1, -1], [3, -1, 4]]
    alone = select(ids[:1], scores[:1], 1)
    assert alone[0].tolist() == [[0, -1, -1]]  # so what is deferred depends on the batch


@pytest.mark.parametrize("seed", range(20))
def test_selection_is_kt_kernels_rule(seed):
    rng = np.random.default_rng(seed)
    tokens, top_k = rng.integers(1, 9), int(rng.integers(1, 7))
    ids = np.stack([rng.permutation(20)[:top_k] for _ in range(tokens)])
    ids[rng.random(ids.shape) < 0.1] = -1
    scores = rng.permutation(tokens * top_k).reshape(tokens, top_k).astype(np.float32)
    for protected in range(-1, top_k + 2):
        kept = set()
        for t in range(tokens):
            kept |= set(ids[t, np.argsort(-scores[t])[: max(protected, 0)]].tolist())
        now, later = select(ids, scores, protected)
        is_now = np.array([[int(i) in kept for i in row] for row in ids])
        assert np.array_equal(now, np.where(is_now, ids, -1)), f"seed {seed}"
        assert np.array_equal(later, np.where(is_now, -1, ids)), f"seed {seed}"


def test_selection_takes_tensors_any_integer_and_minus_one():
    ids = torch.tensor([[-1, 5, -1, 3]], dtype=torch.int32)
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2]]).bfloat16()
    now, later = select(ids, scores, 2)
    assert (now.dtype, later.dtype) == (torch.int64, torch.int64)
    assert now.tolist() == [[-1, -1, -1, -1]]
    assert later.tolist() == [[-1, 5, -1, 3]]
    assert loaded().select_deferred_experts(ids, scores, 4)[0].tolist() == ids.tolist()
    assert [x.shape for x in select(np.empty((0, 3), int), np.empty((0, 3)), 1)] == [(0, 3), (0, 3)]
    with pytest.raises(ValueError, match="topk_weights has shape"):
        select(ids, scores[:, :2], 1)


# -- where the results go --------------------------------------------------------------------------


def layers(max_deferred, count=3, **arguments):
    """``count`` consecutive layers from 4 on; the last defers nothing."""
    numbers = [max_deferred] * (count - 1) + [0]
    return [
        loaded(4 + n, max_deferred_experts_per_token=d, **arguments) for n, d in enumerate(numbers)
    ]


def parts(wrapper, case):
    """float32 (immediate, deferred) sums of one layer, exactly."""
    hidden, ids, weights = case
    protected = K - wrapper.max_deferred_experts_per_token
    now, later = select(ids, weights, protected) if protected < K else (ids, np.full_like(ids, -1))
    skip = wrapper.gpu_experts_mask.numpy()
    return exact(wrapper, hidden, now, weights, skip), exact(wrapper, hidden, later, weights, skip)


@pytest.mark.parametrize("max_deferred", [1, 2, K, K + 5])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_each_output_is_its_immediate_plus_the_layer_befores_deferred(max_deferred, num_tokens):
    chain = layers(max_deferred, num_gpu_experts=1)
    for token in range(2):
        before = np.zeros((), np.float32)
        for n, wrapper in enumerate(chain):
            case = routed(num_tokens, seed=10 * token + n)
            now, later = parts(wrapper, case)
            assert later.any() or n == 2 or max_deferred == 1
            wrapper.submit_forward(*case)
            assert_same_bits(now + before, wrapper.sync_forward(case[0]))
            before = later


def test_the_sum_is_rounded_once():
    first, second = layers(2, count=2)
    cases = []
    for seed in range(2):
        hidden, ids, weights = routed(4, seed)
        cases.append((bf16_to_f32(f32_to_bf16(hidden)), ids, weights))
    for wrapper, (hidden, ids, weights) in zip((first, second), cases, strict=True):
        got = wrapper.forward(torch.from_numpy(hidden).bfloat16(), ids, weights)
    want = parts(second, cases[1])[0] + parts(first, cases[0])[1]
    assert_same_bits(f32_to_bf16(want), got.view(torch.uint16))


def test_sync_leaves_the_deferred_experts_running(monkeypatch):
    first, second = layers(1, count=2)
    gate, calls = threading.Event(), []

    def hold_the_second(hidden):
        calls.append(hidden)
        if len(calls) == 2:
            gate.wait(30)

    spy(first, monkeypatch, hold_the_second)
    cases = routed(2, 0), routed(2, 1)
    want = parts(second, cases[1])[0] + parts(first, cases[0])[1]
    calls.clear()
    first.submit_forward(*cases[0])
    first.sync_forward(cases[0][0])  # returns, although the deferred ones wait at the gate
    second.submit_forward(*cases[1])
    gate.set()
    assert_same_bits(want, second.sync_forward(cases[1][0]))


def test_off_by_default_and_nothing_deferred_leaves_nothing_behind():
    first, second = loaded(0), loaded(1)
    case = routed(3)
    assert_same_bits(exact(first, *case), first.forward(*case))
    assert_same_bits(exact(second, *case), second.forward(*case))
    assert first.max_deferred_experts_per_token == 0


# -- where they must not go ------------------------------------------------------------------------


def test_dropped_if_the_next_layer_is_not_consecutive():
    first, _, third = layers(2)
    case = routed(2)
    first.forward(*case)
    assert_same_bits(exact(third, *case), third.forward(*case))


def test_dropped_if_the_batch_size_changes():
    first, second = layers(2, count=2)
    first.forward(*routed(2))
    case = routed(3)
    assert_same_bits(exact(second, *case), second.forward(*case))


def test_used_once():
    first, second = layers(2, count=2)
    case = routed(2)
    first.forward(*case)
    second.forward(*case)
    assert_same_bits(exact(second, *case), second.forward(*case))


def test_an_abandoned_sequence_leaves_nothing_to_the_next():
    first, second, third = layers(2)
    old, new = routed(2, 0), routed(2, 1)
    first.forward(*old)
    second.submit_forward(*old)  # abandoned here, before its sync; its deferred experts are pending
    now, later = parts(first, new)
    assert_same_bits(now, first.forward(*new))
    assert_same_bits(parts(second, new)[0] + later, second.forward(*new))
    first.forward(*old)  # abandoned again: the next starts at another layer
    assert_same_bits(exact(third, *new), third.forward(*new))


def test_an_error_ends_the_sequence(monkeypatch):
    first, second = layers(2, count=2)
    case = routed(2)
    first.forward(*case)
    with pytest.raises(ValueError, match="topk_ids"):
        second.forward(case[0], case[1][:1], case[2])
    assert_same_bits(exact(second, *case), second.forward(*case))
    first.forward(*case)
    with monkeypatch.context() as patch:
        patch.setattr(first.moe.runner, "forward", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            first.forward(*case)
        fifo.drain()
    assert_same_bits(exact(second, *case), second.forward(*case))


def test_clear_buffer_cache_begins_anew():
    first, second = layers(2, count=2)
    case = routed(2)
    first.forward(*case)
    ktk.KTMoEWrapper.clear_buffer_cache()
    assert_same_bits(exact(second, *case), second.forward(*case))


def test_each_thread_is_a_sequence_of_its_own():
    chain = layers(2)
    barrier = threading.Barrier(4)

    def run(seed):
        outputs = []
        for n, wrapper in enumerate(chain):
            barrier.wait(30)
            outputs.append(wrapper.forward(*routed(2, seed * 10 + n)))
        return outputs

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    for seed, outputs in enumerate(results):
        before = np.zeros((), np.float32)
        for n, (wrapper, got) in enumerate(zip(chain, outputs, strict=True)):
            now, later = parts(wrapper, routed(2, seed * 10 + n))
            assert_same_bits(now + before, got)
            before = later


def test_a_deferred_tasks_exception_is_raised_by_the_layer_that_needs_it(monkeypatch):
    first, second = layers(1, count=2)
    case, calls = routed(2), []

    def fail_the_second(hidden):
        calls.append(hidden)
        if len(calls) == 2:
            raise FloatingPointError("deferred")

    with monkeypatch.context() as patch:
        spy(first, patch, fail_the_second)
        first.submit_forward(*case)
        second.submit_forward(*case)
        fifo.drain()
    with pytest.raises(FloatingPointError, match="deferred"):
        second.sync_forward(case[0])
    first.sync_forward(case[0])  # which has its own result, and does not raise it again
    assert_same_bits(exact(second, *case), second.forward(*case))


def test_a_dropped_deferred_tasks_exception_is_raised_by_its_own_layer(monkeypatch):
    first = layers(1, count=2)[0]
    case, calls = routed(2), []

    def fail_the_second(hidden):
        calls.append(hidden)
        if len(calls) == 2:
            raise FloatingPointError("deferred")

    with monkeypatch.context() as patch:
        spy(first, patch, fail_the_second)
        first.forward(*case)
        fifo.drain()
    with pytest.raises(FloatingPointError, match="deferred"):
        first.forward(*case)
    assert_same_bits(parts(first, case)[0], first.forward(*case))
