"""Hybrid passes on streams: the sums of passes without, nothing waited for, graphs, swaps.

The streams are threads (``make.streams``): a GPU's own were not run here.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.ops.hybrid import HybridMoE
from ktk.ops.hybrid_stream import MOST_TOKENS
from ktk.ops.moe import MoE
from ktk.ops.stream_moe import BufferPool
from ktk.placement.masks.updates import OnlineUpdate
from make.cases import pack_all, random_experts, random_hidden, random_routing
from make.streams import ThreadStreams

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")

EXPERTS, HIDDEN, TOP_K = 6, 96, 3
PACKED = [
    pack_all(spec, random_experts(spec, seed))
    for seed, spec in enumerate(
        [MoESpec(EXPERTS, HIDDEN, 64, "fp32", has_bias=True), MoESpec(EXPERTS, HIDDEN, 64, "int8")]
    )
]


@pytest.fixture
def streams() -> Iterator[ThreadStreams]:
    made = ThreadStreams()
    yield made
    made.close()


def layer(number: int = 0, mask: Any = (1, 0, 1, 0, 0, 1), **options: Any) -> HybridMoE:
    given = np.asarray(mask, bool)
    return HybridMoE(PACKED[number % 2], given, device="cpu", dtype=torch.float32, **options)


def call(tokens: int, seed: int) -> list[torch.Tensor]:
    ids, weights = random_routing(tokens, TOP_K, EXPERTS, seed)
    return [torch.from_numpy(a) for a in (random_hidden(tokens, HIDDEN, seed), ids, weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pass_waits_for_nothing_and_has_the_bits_of_one_without_streams(
    streams: ThreadStreams, dtype: torch.dtype
) -> None:
    hidden, ids, weights = call(7, 1)
    ids[0], ids[1, 1], ids[2, 0] = -1, EXPERTS, 2**40  # ids of no expert add nothing
    inputs = hidden.to(dtype).reshape(1, 7, HIDDEN), ids, weights
    want, made = layer()(*inputs), layer(streams=streams)
    streams.late = 0.05
    got = made(*inputs)
    assert streams.calls == 0  # not yet
    streams.synchronise()
    assert streams.calls == 1
    assert (got.dtype, got.shape) == (dtype, want.shape) and torch.equal(want, got)


@pytest.mark.parametrize("mask", [np.zeros(EXPERTS), np.ones(EXPERTS), np.arange(EXPERTS) < 1])
def test_all_none_or_one_of_the_experts_may_be_on_the_device(
    streams: ThreadStreams, mask: np.ndarray
) -> None:
    inputs = call(5, 2)
    got = layer(mask=mask, streams=streams)(*inputs)
    streams.synchronise()
    np.testing.assert_allclose(got, MoE(PACKED[0])(*inputs), rtol=1e-5, atol=1e-5)


def test_layers_in_a_row_share_buffers(streams: ThreadStreams) -> None:
    pool = BufferPool()
    layers = [layer(n, streams=streams, pool=pool) for n in range(4)]
    inputs = [call(3, n) for n in range(4)]
    got = [made(*own) for made, own in zip(layers, inputs, strict=True)]
    streams.synchronise()
    assert all(torch.equal(layer(n)(*own), got[n]) for n, own in enumerate(inputs))
    assert len(pool._all) == 1


def test_a_graph_does_it_again_with_what_lies_there_then_also_after_a_swap(
    streams: ThreadStreams,
) -> None:
    pool, inputs = BufferPool(), [call(4, n) for n in range(2)]
    layers = [layer(n, streams=streams, pool=pool) for n in range(2)]
    with streams.capturing() as graph:
        out = [made(*own) for made, own in zip(layers, inputs, strict=True)]
    assert streams.calls == 0
    for replay, mask in enumerate([(1, 0, 1, 0, 0, 1), (0, 1, 1, 0, 1, 0), (0, 0, 0, 0, 0, 0)]):
        layers[1].swap(np.asarray(mask, bool))
        for n, own in enumerate(inputs):
            for tensor, new in zip(own, call(4, 10 * replay + n), strict=True):
                tensor.copy_(new)
        streams.replay(graph)
        want = [layer(0)(*inputs[0]), layer(1, mask)(*inputs[1])]
        assert all(map(torch.equal, want, out)), replay


def test_swaps_while_passes_run_show_in_no_result(
    streams: ThreadStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, inputs = layer(streams=streams), call(6, 3)
    # What a device's synchronise does; here torch's "cpu" is the device, its work the streams'.
    monkeypatch.setattr(type(made.device_experts), "synchronise", lambda _: streams.synchronise())
    wanted = [np.roll(np.array([1, 0, 1, 0, 0, 1], bool), n) for n in range(EXPERTS)]
    want = {mask.tobytes(): layer(mask=mask)(*inputs) for mask in wanted}
    over, results, marks = threading.Event(), [], []

    def calls() -> None:
        while not over.is_set():
            results.append(made(*inputs))
            marks.append(streams.mark(streams.main))
            streams.finish(marks[max(0, len(marks) - 3)])  # two are always on their way

    thread = threading.Thread(target=calls)
    thread.start()
    try:
        for mask in wanted:
            made.swap(mask)
    finally:
        over.set()
        thread.join()
    streams.synchronise()
    last = made(*inputs)
    streams.synchronise()
    assert torch.equal(last, want[made.mask.tobytes()])
    # Between its two tables a pass may find fewer on the device, never a wrong one.
    assert results
    for got in results:
        np.testing.assert_allclose(got, last, rtol=1e-5, atol=1e-5)


def test_calls_that_must_be_waited_for_are(streams: ThreadStreams) -> None:
    few, many = call(2, 4), call(MOST_TOKENS + 1, 5)
    made = layer(streams=streams)
    np.testing.assert_allclose(made(*many), MoE(PACKED[0])(*many), rtol=1e-5, atol=1e-5)
    added = made(*few, add=torch.ones(2, HIDDEN))
    assert torch.equal(added, layer()(*few, add=torch.ones(2, HIDDEN)))
    array = made(*(x.numpy() for x in few))
    assert isinstance(array, np.ndarray)
    assert torch.equal(made(few[0], few[1].numpy(), few[2]), layer()(*few))
    follows = layer(streams=streams, update=OnlineUpdate())
    follows(*few)
    assert streams.calls == 0


def test_wrong_arguments_are_named(streams: ThreadStreams) -> None:
    made, (hidden, ids, weights) = layer(streams=streams), call(3, 6)
    for given, text in (
        ((hidden[:, :-1], ids, weights), r"hidden_states.*\(num_tokens, 96\)"),
        ((hidden, ids[:2], weights), r"topk_ids.*\(3, 3\)"),
        ((hidden, ids, ids), r"topk_weights.*floats"),
    ):
        with pytest.raises(ValueError, match=text):
            made(*given)


def test_a_layer_that_is_dropped_is_gone(streams: ThreadStreams) -> None:
    made = layer(streams=streams, pool=BufferPool())
    made(*call(2, 7))
    streams.synchronise()
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None
