"""The wrapper's calls with a CUDA stream: put on it, so that nothing waits, and for graphs."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch

from ktk import fork
from ktk.errors import BackendError
from ktk.machine.streams import streams_of
from ktk.ops.inputs import is_tensor
from ktk.ops.moe import MoE
from ktk.ops.stream_moe import BufferPool, Pass, Pending, StreamMoE, check_tensors
from ktk.ops.streamed import AnyMoE

pool = BufferPool()


class _Deferred(NamedTuple):
    meant_for: tuple[int, int, int]
    pending: Pending


class _Sequence(threading.local):
    """Deferred experts of the calling thread's last pass: see ``ktk.ops.deferral``."""

    deferred: _Deferred | None = None


_sequence = _Sequence()


@fork.in_child
def forget_deferred() -> None:
    """In a child: what its parent had put on streams is not the child's."""
    _sequence.deferred = None


class Sizes(NamedTuple):
    """Of a wrapper, by its names."""

    layer_idx: int
    hidden_size: int
    num_experts_per_tok: int
    max_deferred_experts_per_token: int
    chunked_prefill_size: int


class StreamSide:
    """One wrapper's passes on streams.

    mask : bool (num_experts,) CPU tensor; experts that run elsewhere, as it is when a pass runs.
    """

    def __init__(self, sizes: Sizes, mask: torch.Tensor) -> None:
        self._sizes, self._mask = sizes, mask
        self._moe: MoE | None = None
        self._made: dict[torch.device, StreamMoE] = {}

    def takes(self, moe: Any, hidden: Any, stream: Any) -> bool:
        """Whether a call can be put on its stream. BackendError where the stream is captured in a
        graph and the call could not be.
        """
        handle = _handle(stream)
        if not handle or not is_tensor(hidden) or (on := streams_of(hidden.device)) is None:
            return False
        reason = self._why_not(moe, hidden.shape[:-1].numel())
        if reason is not None and on.is_capturing(handle):
            raise BackendError(f"a pass in a CUDA graph: {reason}")
        return reason is None

    def _why_not(self, moe: Any, num_tokens: int) -> str | None:
        if not isinstance(moe, MoE):
            return "experts that are read from disk need Python"
        if num_tokens > self._sizes.chunked_prefill_size:
            return f"{num_tokens} tokens: chunked_prefill_size is less"
        return moe.runner.why_not_prepared()

    def submit(
        self, moe: AnyMoE, hidden: Any, topk_ids: Any, topk_weights: Any, stream: Any
    ) -> Pass:
        w, before = self._sizes, _sequence.deferred
        _sequence.deferred = None
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        check_tensors(rows, topk_ids, topk_weights, w.hidden_size, w.num_experts_per_tok)
        here = (w.layer_idx, *rows.shape)
        pending = before.pending if before is not None and before.meant_for == here else None
        made = self._stream_moe(moe, rows.device)
        given = made.submit(_handle(stream), rows, topk_ids, topk_weights, pending)
        if given.deferred is not None:
            _sequence.deferred = _Deferred((w.layer_idx + 1, *rows.shape), given.deferred)
        return given

    def finish(self, given: Pass, stream: Any, device: torch.device) -> torch.Tensor:
        try:
            return self._made[device].finish(given, _handle(stream) or given.stream, device)
        except BaseException:
            _sequence.deferred = None
            raise

    def _stream_moe(self, moe: AnyMoE, device: torch.device) -> StreamMoE:
        assert isinstance(moe, MoE)
        if moe is not self._moe:  # weights were loaded again
            self._moe, self._made = moe, {}
        if device not in self._made:
            w, on = self._sizes, streams_of(device)
            deferred = w.max_deferred_experts_per_token
            assert on is not None
            protected = w.num_experts_per_tok - deferred if deferred else None
            made = StreamMoE(moe, on, self._mask.numpy(), pool, w.layer_idx % 2, protected)
            self._made[device] = made
        return self._made[device]


def _handle(stream: Any) -> int:
    handle = getattr(stream, "cuda_stream", stream) or 0
    if not isinstance(handle, int):
        raise TypeError(f"cuda_stream={stream!r}: must be a CUDA stream handle, or None")
    return handle
