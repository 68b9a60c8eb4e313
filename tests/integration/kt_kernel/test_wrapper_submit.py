"""KTMoEWrapper.submit_forward and sync_forward, the worker behind them, staging buffers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import ktk
from ktk.errors import EngineError
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.integration.kt_kernel import wrapper as module
from ktk.machine import queue as fifo
from ktk.ops import inputs
from make.wrapper_cases import (
    H,
    K,
    assert_same_bits,
    exact,
    loaded,
    make,
    random_weights,
    routed,
    worker_held,
)

# -- submit and sync -------------------------------------------------------------------------------


def test_submit_returns_before_the_work_and_inputs_may_be_overwritten():
    wrapper = loaded()
    for kind in (lambda a: a.copy(), lambda a: torch.from_numpy(a.copy())):
        case = routed(4)
        given = [kind(a) for a in case]
        with worker_held():
            start = time.perf_counter()
            wrapper.submit_forward(*given, cuda_stream=None)
            assert time.perf_counter() - start < 5  # it would wait for 30 s
            for a in given:
                a[:] = 0
        assert_same_bits(exact(wrapper, *case), wrapper.sync_forward(given[0]))


def test_work_runs_in_the_order_of_submits():
    wrappers = [loaded(i) for i in range(4)]
    cases = [routed(2, seed) for seed in range(4)]
    with worker_held():
        for wrapper, case in zip(wrappers, cases, strict=True):
            wrapper.submit_forward(*case)
    for wrapper, case in reversed(list(zip(wrappers, cases, strict=True))):
        assert_same_bits(exact(wrapper, *case), wrapper.sync_forward(case[0]))


def test_sync_without_submit_is_refused():
    wrapper = loaded()
    case = routed(2)
    with pytest.raises(RuntimeError, match="sync_forward without submit_forward"):
        wrapper.sync_forward(case[0])
    wrapper.submit_forward(*case)
    wrapper.sync_forward(case[0])
    with pytest.raises(RuntimeError, match="sync_forward without submit_forward"):
        wrapper.sync_forward(case[0])


def test_sync_with_other_tokens_is_refused_and_loses_nothing():
    wrapper = loaded()
    case = routed(2)
    wrapper.submit_forward(*case)
    for other in (np.zeros((3, H), np.float32), None):
        with pytest.raises(ValueError, match="2 tokens of 64 were submitted"):
            wrapper.sync_forward(other)
    assert_same_bits(exact(wrapper, *case), wrapper.sync_forward(case[0].reshape(1, 2, H)))


def test_the_last_submit_wins_and_forward_leaves_it_alone():
    wrapper = loaded()
    first, second, third = (routed(2, seed) for seed in range(3))
    wrapper.submit_forward(*first)
    wrapper.submit_forward(*second)
    assert_same_bits(exact(wrapper, *third), wrapper.forward(*third))
    assert_same_bits(exact(wrapper, *second), wrapper.sync_forward(second[0]))
    wrapper.submit_forward(*first)
    with pytest.raises(ValueError, match="topk_ids"):
        wrapper.submit_forward(second[0], second[1][:1], second[2])
    with pytest.raises(RuntimeError, match="without submit"):  # not the first one's result
        wrapper.sync_forward(second[0])


def test_a_tasks_exception_is_raised_by_sync_once(monkeypatch):
    wrapper = loaded()
    case = routed(2)
    with monkeypatch.context() as patch:
        patch.setattr(wrapper.moe.runner, "forward", lambda *a: 1 / 0)
        wrapper.submit_forward(*case)
        fifo.drain()
        with pytest.raises(ZeroDivisionError):
            wrapper.sync_forward(case[0])
        wrapper.submit_forward(*case)  # replaced below, so nobody waits for it
        fifo.drain()
    wrapper.submit_forward(*case)
    with pytest.raises(ZeroDivisionError):
        wrapper.sync_forward(case[0])
    assert_same_bits(exact(wrapper, *case), wrapper.forward(*case))


def test_forward_from_many_threads_gives_each_its_own():
    wrapper = loaded(max_deferred_experts_per_token=0)
    cases = [routed(1 + seed % 3, seed) for seed in range(40)]
    wants = [exact(wrapper, *case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for want, got in zip(wants, pool.map(lambda c: wrapper.forward(*c), cases), strict=True):
            assert_same_bits(want, got)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_run_and_does_not_wait_for_the_parents_work():
    wrapper = loaded()
    case = routed(2)
    want = exact(wrapper, *case)
    wrapper.forward(*case)
    with worker_held():
        wrapper.submit_forward(*case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12: fork with threads
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(20)
                with contextlib.suppress(EngineError):
                    wrapper.sync_forward(case[0])
                    code = 2
                if code == 1 and want.tobytes() == wrapper.forward(*case).tobytes():
                    code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_same_bits(want, wrapper.sync_forward(case[0]))


# -- buffers ---------------------------------------------------------------------------------------


@pytest.fixture
def buffers():
    """The staging buffers, empty before and after."""
    fifo.drain()
    ktk.KTMoEWrapper.clear_buffer_cache()
    yield module._buffers
    ktk.KTMoEWrapper.set_capture_batch_sizes([])
    fifo.drain()
    ktk.KTMoEWrapper.clear_buffer_cache()


def test_captured_sizes_keep_their_buffers_others_share_one(buffers):
    wrapper = loaded()
    wrapper.set_capture_batch_sizes([1, 4])
    assert ktk.KTMoEWrapper.get_capture_batch_sizes() == [1, 4]
    for num_tokens in (1, 2, 3, 4, 4, 1):
        wrapper.forward(*routed(num_tokens))
    fifo.drain()
    assert sorted(key[0] for key in buffers.kept) == [1, 4]
    assert [len(kept) for kept in buffers.kept.values()] == [1, 1]
    assert buffers.temporary.key[0] == 3
    kept = buffers.kept[(1, H, K, "float32", "numpy")][0]
    wrapper.forward(*routed(1))
    assert buffers.kept[(1, H, K, "float32", "numpy")] == [kept]
    ktk.KTMoEWrapper.clear_buffer_cache()
    assert (buffers.kept, buffers.temporary) == ({}, None)
    with pytest.raises(ValueError, match="capture batch size=0"):
        ktk.KTMoEWrapper.set_capture_batch_sizes([1, 0])


def test_layers_of_other_shapes_and_dtypes_do_not_share_buffers(buffers):
    ktk.KTMoEWrapper.set_capture_batch_sizes([2])
    wide = make(hidden_size=2 * H, num_experts_per_tok=1)
    gate, up, down = random_weights()
    wide.load_weights_from_tensors(np.tile(gate, 2), np.tile(up, 2), np.tile(down, (1, 2, 1)))
    narrow = loaded()
    hidden, ids, weights = routed(2)
    with worker_held():  # all in flight at a time
        wide.submit_forward(np.tile(hidden, 2), ids[:, :1], weights[:, :1])
        narrow.submit_forward(hidden, ids, weights)
        other = loaded(seed=1)
        other.submit_forward(torch.from_numpy(hidden).bfloat16(), ids, weights)
    want = exact(wide, np.tile(hidden, 2), ids[:, :1], weights[:, :1])
    assert_same_bits(want, wide.sync_forward(np.tile(hidden, 2)))
    assert_same_bits(exact(narrow, hidden, ids, weights), narrow.sync_forward(hidden))
    want = f32_to_bf16(exact(other, bf16_to_f32(f32_to_bf16(hidden)), ids, weights))
    assert_same_bits(want, other.sync_forward(hidden).view(torch.uint16))
    assert {key[1:] for key in buffers.kept} == {
        (2 * H, 1, "float32", "numpy"),
        (H, K, "float32", "numpy"),
        (H, K, "torch.bfloat16", "cpu"),
    }


def test_a_worker_that_does_not_start_is_started_by_the_next_submit(monkeypatch):
    queue, start = fifo.Fifo(), threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        queue.submit(lambda: 1)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert queue.submit(lambda: 2).take() == 2


def test_an_interrupt_in_the_callers_task_leaves_the_queue_working():
    queue = fifo.Fifo()

    def interrupted():
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            queue.run(interrupted).take()
        assert queue.submit(lambda: 2).take() == 2
        assert queue.run(lambda: 3).take() == 3


def test_nothing_needs_cuda():
    wrapper = loaded(num_gpu_experts=2)
    wrapper.forward(torch.from_numpy(routed(2)[0]), *routed(2)[1:], cuda_stream=0)
    assert not torch.cuda.is_initialized()


def test_the_queue_runs_one_task_at_a_time_in_order_whoever_runs_it():
    queue, log, running = fifo.Fifo(), [], threading.Lock()

    def task(name):
        assert running.acquire(blocking=False)
        log.append(name)
        time.sleep(0 if name[1] % 5 else 1e-4)
        running.release()

    def caller(thread):
        tickets = []
        for i in range(200):
            start = queue.run if (i + thread) % 3 else queue.submit
            tickets.append(start(partial(task, (thread, i))))
        for ticket in tickets:
            ticket.take()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caller, range(4)))
    for thread in range(4):
        assert [i for t, i in log if t == thread] == list(range(200))


def test_a_task_that_waits_in_the_queue_is_not_overtaken():
    queue, log, gate = fifo.Fifo(), [], threading.Event()
    first = queue.submit(lambda: gate.wait(30) and log.append(1))
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    queue.run(lambda: log.append(2)).take()
    first.take()
    assert log == [1, 2]


def test_a_cuda_graph_that_is_captured_is_refused_and_says_what_to_do(monkeypatch):
    """Without a GPU: only what the wrapper asks is made to say so."""
    wrapper = loaded()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    wrapper.forward(*routed(2))  # of the CPU's own arrays nothing is captured
    monkeypatch.setattr(inputs, "device_of", lambda x: "cuda:0")
    with pytest.raises(RuntimeError, match="given as KTMoEWrapper.s cuda_stream"):
        wrapper.submit_forward(*routed(2))
    with pytest.raises(RuntimeError, match="nothing is under way"):
        wrapper.sync_forward(routed(2)[0])
