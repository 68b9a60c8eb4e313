"""A layer's experts as part of a CUDA stream's work.

The device copies what a pass needs into pinned memory, a function of C computes in a thread of the
driver's, the device copies the sums back. The caller waits for nothing, and a graph that captured
this does it again with whatever then lies on the device.

A stream's passes take turns with two sets of buffers, as layers do: deferred experts still read one
while the next layer's input comes into the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ktk.backends import Operands
from ktk.errors import BackendError
from ktk.fork import Lock
from ktk.ops.moe import MoE

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.float16, torch.float32: torch.float32}


class Streams(Protocol):
    """See ``ktk.machine.streams.CudaStreams``."""

    def current(self) -> int: ...
    def new(self) -> int: ...
    def use(self, stream: int) -> Any: ...
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def copy(self, stream: int, to: torch.Tensor, source: torch.Tensor) -> None: ...
    def call(self, stream: int, function: int, data: int) -> None: ...
    def work(self, stream: int, function: Callable[[], Any]) -> None: ...
    def mark(self, stream: int) -> Any: ...
    def wait(self, stream: int, mark: Any) -> None: ...
    def finish(self, mark: Any) -> None: ...
    def is_capturing(self, stream: int) -> bool: ...


class Key(NamedTuple):
    """Of which passes share buffers."""

    stream: int
    turn: int
    num_tokens: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    defers: bool


class _Buffers:
    """Pinned memory of passes of one key."""

    def __init__(self, key: Key, streams: Streams) -> None:
        rows, slots = (key.num_tokens, key.hidden_size), (key.num_tokens, key.top_k)
        self.hidden = streams.pinned(rows, key.dtype)
        self.out = streams.pinned(rows, key.dtype)
        self.ids = streams.pinned(slots, torch.int64)
        self.weights = streams.pinned(slots, torch.float32)
        self.sums = self.floats = self.later = None
        if key.defers:
            self.floats = streams.pinned(rows, torch.float32)
            self.sums = streams.pinned(rows, torch.float32)
            self.later = streams.pinned(slots, torch.int64)
        self.passes: dict[Any, Any] = {}
        self.uses: list[Any] = []  # marks of the last work on them
        self.unjoined: Any = None  # mark of deferred experts that no pass has waited for


class BufferPool:
    """Buffers by key. Those of ``kept`` numbers of tokens, and those of graphs, stay; of the others
    each stream and turn has one set.
    """

    def __init__(self) -> None:
        self.kept: tuple[int, ...] = ()
        self._all: dict[Key, _Buffers] = {}
        self._passing: dict[tuple[int, int], Key] = {}
        self._beside: int | None = None
        self._lock = Lock()

    def beside(self, streams: Streams) -> int:
        """A stream for host functions that the device's own work is not to wait for."""
        with self._lock:
            if self._beside is None:
                self._beside = streams.new()
            return self._beside

    def take(self, key: Key, streams: Streams) -> _Buffers:
        """Waits for the device where buffers of another size are in the way."""
        is_to_stay = key.num_tokens in self.kept or streams.is_capturing(key.stream)
        with self._lock:
            if is_to_stay and self._passing.get(key[:2]) == key:
                del self._passing[key[:2]]
            if (found := self._all.get(key)) is not None:
                return found
            if not is_to_stay:
                before = self._passing.get(key[:2])
                if before is not None:
                    old = self._all.pop(before)  # held until nothing uses its memory
                    for mark in old.uses:
                        streams.finish(mark)
                self._passing[key[:2]] = key
            return self._all.setdefault(key, _Buffers(key, streams))

    def clear(self) -> None:
        """Drop those that no graph uses. The device must have done what it was asked for."""
        with self._lock:
            for key in self._passing.values():
                self._all.pop(key, None)
            self._passing.clear()


class Pending(NamedTuple):
    """Deferred sums on their way: where they will be, and from when on."""

    buffers: _Buffers
    mark: Any


class Pass(NamedTuple):
    """What was submitted."""

    buffers: _Buffers
    num_tokens: int
    stream: int
    deferred: Pending | None
    checks: tuple[Callable[[], None], ...]


class StreamMoE:
    """``MoE`` on streams.

    Parameters
    ----------
    moe : MoE
        By compiled kernels, its experts in memory.
    streams : Streams
        Of the device.
    skip : bool (num_experts,)
        Experts that run elsewhere; read whenever a pass runs, so it may change in place.
    pool : BufferPool
        Shared by the layers of a model.
    turn : int
        0 or 1, not that of the layer before.
    protected : int or None
        Of each token's experts, how many run now; None: all.

    Raises
    ------
    BackendError if the MoE cannot run without Python.
    """

    def __init__(
        self,
        moe: MoE,
        streams: Streams,
        skip: np.ndarray,
        pool: BufferPool,
        turn: int,
        protected: int | None = None,
    ) -> None:
        if reason := moe.runner.why_not_prepared():
            raise BackendError(f"experts on a CUDA stream: {reason}")
        self.moe, self.streams, self.skip, self.pool = moe, streams, skip, pool
        self.turn, self.protected = turn, protected
        self._beside: dict[int, int] = {}  # a stream for deferred experts of each

    def submit(
        self,
        stream: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        pending: Pending | None = None,
    ) -> Pass:
        """Put a pass on the stream.

        hidden : (num_tokens, hidden_size) float32, float16 or bfloat16, on the device; topk_ids :
        (num_tokens, top_k) of any integer type; topk_weights : likewise, any float type. pending :
        sums of the layer before, added before the rounding.
        """
        streams, defers = self.streams, self.protected is not None
        num_tokens, hidden_size = hidden.shape
        top_k, dtype = topk_ids.shape[1], hidden.dtype
        key = Key(stream, self.turn, num_tokens, hidden_size, top_k, dtype, defers)
        buffers = self.pool.take(key, streams)
        if buffers.unjoined is not None:
            streams.wait(stream, buffers.unjoined)
        with streams.use(stream):
            ids, later = topk_ids.long(), None
            if self.protected is not None:
                ids, later = split(ids, topk_weights, self.protected, self.moe.spec.num_experts)
            weights, floats = topk_weights.float(), hidden.float() if defers else None
        for to, source in (
            (buffers.hidden, hidden),
            (buffers.ids, ids),
            (buffers.weights, weights),
            (buffers.floats, floats),
            (buffers.later, later),
        ):
            if to is not None and source is not None:
                streams.copy(stream, to, source)
        if pending is not None:
            streams.wait(stream, pending.mark)
            pending.buffers.unjoined = None
        now, then = self._prepared(buffers, None if pending is None else pending.buffers.sums)
        streams.call(stream, now.function, now.data)
        deferred = None
        if then is not None:
            beside = self._beside.setdefault(stream, 0) or streams.new()
            self._beside[stream] = beside
            streams.wait(beside, streams.mark(stream))
            streams.call(beside, then.function, then.data)
            deferred = Pending(buffers, streams.mark(beside))
        buffers.unjoined = None if deferred is None else deferred.mark
        checks = (now.check,) if then is None else (now.check, then.check)
        return Pass(buffers, len(hidden), stream, deferred, checks)

    def finish(self, given: Pass, stream: int, device: torch.device) -> torch.Tensor:
        """The pass's sums, on the device: a new tensor of hidden's dtype, there when the stream has
        come so far. What failed in passes that have run is raised.
        """
        for check in given.checks:
            check()
        b, streams = given.buffers, self.streams
        with streams.use(given.stream):
            out = torch.empty(b.out.shape, dtype=b.out.dtype, device=device)
        streams.copy(given.stream, out, b.out)
        copied = streams.mark(given.stream)
        if stream != given.stream:
            streams.wait(stream, copied)
        if not streams.is_capturing(given.stream):
            b.uses = [copied] if given.deferred is None else [copied, given.deferred.mark]
        return out

    def _prepared(self, b: _Buffers, sums: torch.Tensor | None) -> tuple[Any, Any]:
        """The pass of now and of later; the same again for the same buffers."""
        key = (id(self), None if sums is None else sums.data_ptr())
        if key not in b.passes:
            prepare = self.moe.runner.prepared
            add = None if sums is None else sums.numpy()
            weights = b.weights.numpy()
            hidden, ids, out = _bits(b.hidden), b.ids.numpy(), _bits(b.out)
            now = prepare(Operands(hidden, ids, weights, self.skip, out, add))
            then = None
            if b.floats is not None and b.later is not None and b.sums is not None:
                floats, later = b.floats.numpy(), b.later.numpy()
                then = prepare(Operands(floats, later, weights, self.skip, b.sums.numpy()))
            b.passes[key] = (now, then, self, sums)
        return b.passes[key][:2]


def split(
    ids: torch.Tensor, scores: torch.Tensor, protected: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ktk.ops.deferral.split`` on a device, without waiting for it. ids : int64."""
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :protected]
    inside = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    is_now = torch.zeros(num_experts + 1, dtype=torch.bool, device=ids.device)
    is_now.index_fill_(0, inside.gather(1, best).flatten(), True)
    now = is_now[inside]
    none = torch.full_like(ids, -1)
    return torch.where(now, ids, none), torch.where(now, none, ids)


def check_tensors(rows: Any, ids: Any, weights: Any, hidden_size: int, top_k: int) -> None:
    """What ``ktk.ops.inputs`` checks, of tensors that stay where they are."""
    if rows.dtype not in _BITS or rows.shape[1] != hidden_size:
        raise ValueError(
            f"hidden_states: {rows.dtype} {tuple(rows.shape)}: must be bfloat16, float16 or "
            f"float32 (num_tokens, {hidden_size})"
        )
    shape = (len(rows), top_k)
    for name, given, is_right in (
        ("topk_ids", ids, not ids.dtype.is_floating_point and ids.dtype != torch.bool),
        ("topk_weights", weights, weights.dtype.is_floating_point),
    ):
        if tuple(given.shape) != shape or given.device != rows.device or not is_right:
            raise ValueError(
                f"{name}: {given.dtype} {tuple(given.shape)} on {given.device}: must be "
                f"{'integers' if name == 'topk_ids' else 'floats'} {shape} on {rows.device}; fill "
                "unused slots with id -1"
            )


def _bits(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = x.view(_BITS[x.dtype]).numpy()
    return found
