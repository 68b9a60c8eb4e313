"""Passes on streams: the bits of passes without, nothing waited for, and graphs.

The streams are threads (``make.streams``): a GPU's own were not run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ktk.errors import BackendError
from ktk.integration.kt_kernel import stream_side
from ktk.machine import cpu
from ktk.ops import deferral
from ktk.ops.stream_moe import split
from make.streams import ThreadStreams
from make.wrapper_cases import E, H, K, loaded, routed

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadStreams]:
    made = ThreadStreams()
    monkeypatch.setattr(stream_side, "streams_of", lambda device: made)
    monkeypatch.setattr(stream_side, "pool", stream_side.pool)
    stream_side.pool.kept = ()
    stream_side.pool._all.clear()
    stream_side.pool._passing.clear()
    stream_side.forget_deferred()
    yield made
    made.close()


def given(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    hidden, ids, weights = (torch.from_numpy(a) for a in routed(tokens, seed))
    return [hidden.to(dtype), ids, weights]


def wrapper(layer: int = 0, **arguments: Any) -> Any:
    return loaded(layer, **{"method": "INT8", "weight_format": None, **arguments})


def through(layers: list[Any], tokens: int, seed: int, stream: Any = None) -> list[torch.Tensor]:
    """What each layer makes of its own input, in order, as an engine calls them."""
    out = []
    for number, layer in enumerate(layers):
        inputs = given(tokens, seed + number)
        layer.submit_forward(*inputs, stream)
        out.append(layer.sync_forward(inputs[0], stream))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_pass_waits_for_nothing_and_has_the_bits_of_one_without_a_stream(
    streams: ThreadStreams, dtype: torch.dtype
) -> None:
    streams.late, stream = 0.05, streams.new()
    layer, inputs = wrapper(), given(5, 1, dtype)
    want = layer.forward(*inputs)
    layer.submit_forward(inputs[0], inputs[1].int(), inputs[2].double(), stream)
    got = layer.sync_forward(inputs[0], stream)
    assert streams.calls == 0  # not yet
    streams.synchronise()
    assert streams.calls == 1
    assert got.dtype == dtype and torch.equal(want, got)


def test_layers_in_a_row_share_two_sets_of_buffers(streams: ThreadStreams) -> None:
    stream, layers = streams.new(), [wrapper(n) for n in range(5)]
    want = through(layers, 3, 10)
    got = through(layers, 3, 10, stream)
    streams.synchronise()
    assert all(map(torch.equal, want, got))
    assert len(stream_side.pool._all) == 2


def test_a_graph_does_it_again_with_what_lies_there_then(streams: ThreadStreams) -> None:
    stream, layers = streams.new(), [wrapper(n) for n in range(3)]
    inputs = [given(4, n) for n in range(3)]
    with streams.capturing() as graph:
        out = []
        for layer, own in zip(layers, inputs, strict=True):
            layer.submit_forward(*own, stream)
            out.append(layer.sync_forward(own[0], stream))
    assert streams.calls == 0
    for replay in range(4):
        for n, own in enumerate(inputs):
            for tensor, new in zip(own, given(4, 100 * replay + n), strict=True):
                tensor.copy_(new)
        layers[1].gpu_experts_mask[:] = torch.arange(E) % 3 == replay
        streams.replay(graph)
        want = [layer.forward(*own) for layer, own in zip(layers, inputs, strict=True)]
        assert all(map(torch.equal, want, out)), replay
    assert streams.calls == 12
    inputs = [given(2, n) for n in range(3)]  # others between do not disturb the graph's buffers
    layers[0].submit_forward(*inputs[0], stream)
    layers[0].sync_forward(inputs[0][0], stream)
    streams.synchronise()
    stream_side.pool.clear()
    streams.replay(graph)
    assert all(map(torch.equal, want, out))


def test_deferred_experts_come_with_the_next_layer(streams: ThreadStreams) -> None:
    stream = streams.new()
    layers = [wrapper(n, max_deferred_experts_per_token=2 if n < 4 else 0) for n in range(5)]
    for seed in (20, 40):
        want = through(layers, 3, seed)
        got = through(layers, 3, seed, stream)
        streams.synchronise()
        assert all(map(torch.equal, want, got))


def test_deferred_experts_of_a_dropped_sequence_are_not_added(streams: ThreadStreams) -> None:
    stream = streams.new()
    layers = [wrapper(n, max_deferred_experts_per_token=1) for n in range(3)]
    want = through([layers[0], layers[2], layers[0]], 3, 60)
    got = through([layers[0], layers[2], layers[0]], 3, 60, stream)
    streams.synchronise()
    assert all(map(torch.equal, want, got))


def test_streams_do_not_share_buffers(streams: ThreadStreams) -> None:
    one, two = streams.new(), streams.new()
    layer, first, second = wrapper(), given(4, 1), given(4, 2)
    want = [layer.forward(*first), layer.forward(*second)]
    got = [layer.forward(*first, one), layer.forward(*second, two)]
    layer.submit_forward(*first, one)
    got.append(layer.sync_forward(first[0], two))  # there when the other stream has come so far
    mark = streams.mark(two)
    streams.finish(mark)
    assert torch.equal(want[0], got[2])
    streams.synchronise()
    assert all(map(torch.equal, want, got[:2]))


def test_buffers_of_captured_sizes_stay_and_others_pass(streams: ThreadStreams) -> None:
    stream, layer = streams.new(), wrapper()
    layer.set_capture_batch_sizes([2])
    for tokens in (2, 3, 2, 5, 3, 1):
        inputs = given(tokens, tokens)
        got = layer.forward(*inputs, stream)
        streams.synchronise()
        assert torch.equal(layer.forward(*inputs), got)
    assert sorted(key.num_tokens for key in stream_side.pool._all) == [1, 2]
    layer.set_capture_batch_sizes([])


def test_what_fails_leaves_nan_and_is_raised_by_the_next(streams: ThreadStreams) -> None:
    stream = streams.new()
    mask = [True] + [False] * (E - 1)
    layer = wrapper(load_gpu_experts=False, gpu_experts_mask=mask)
    inputs = given(2, 3)
    inputs[1][:] = torch.tensor([0, 1, 2])
    want = layer.forward(*inputs)
    layer.gpu_experts_mask[0] = False
    lost = layer.forward(*inputs, stream)
    streams.synchronise()
    assert lost.isnan().all()
    with pytest.raises(BackendError, match="experts 0 are not in memory"):
        layer.forward(*inputs, stream)
    streams.synchronise()
    layer.gpu_experts_mask[0] = True
    with pytest.raises(BackendError):  # the one that found the error failed again
        layer.forward(*inputs, stream)
    got = layer.forward(*inputs, stream)
    streams.synchronise()
    assert torch.equal(want, got)


def test_what_needs_python_runs_without_the_stream_but_not_in_a_graph(
    streams: ThreadStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, inputs = streams.new(), given(3, 1)
    numpy, small = loaded(0), wrapper(chunked_prefill_size=2)
    monkeypatch.setattr("ktk.integration.kt_kernel.wrapper.on_stream", lambda *_: streams.use(1))
    monkeypatch.setattr("ktk.ops.inputs.on_stream", lambda *_: streams.use(1))
    for layer, reason in ((numpy, "not compiled need Python"), (small, "3 tokens: chunked")):
        assert torch.equal(layer.forward(*inputs), layer.forward(*inputs, stream))
        with streams.capturing(), pytest.raises(BackendError, match=reason):
            layer.forward(*inputs, stream)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, i, w: (x[:, 1:], i, w), r"hidden_states.*must be bfloat16.*\(num_tokens, 64\)"),
        (lambda x, i, w: (x.int(), i, w), "hidden_states: torch.int32"),
        (lambda x, i, w: (x, i[:, :2], w), r"topk_ids.*must be integers \(4, 3\)"),
        (lambda x, i, w: (x, w, w), "topk_ids: torch.float32"),
        (lambda x, i, w: (x, i, i), "topk_weights.*must be floats"),
    ],
)
def test_wrong_tensors_are_named_at_once(streams: ThreadStreams, change: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        wrapper().submit_forward(*change(*given(4, 1)), streams.new())


def test_a_device_chooses_the_deferred_as_the_cpu_does() -> None:
    rng = np.random.default_rng(0)
    for case in range(60):
        tokens, protected = int(rng.integers(1, 9)), int(rng.integers(0, K + 1))
        ids = rng.integers(-1, E, (tokens, K))
        scores = rng.integers(0, 4, ids.shape).astype(np.float32)  # many are equal
        want = deferral.split(ids, scores, protected)
        got = split(torch.from_numpy(ids), torch.from_numpy(scores), protected, E)
        assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True)), case
    assert H == 64
