"""Where a layer's experts are, and that they stay there while a call uses them.

Experts that lie in one place need none of this: ``MoE`` takes ``StoredExperts``, and those of which
some are left out (``StoredExperts.order``). A store is for experts that move, go and come back.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ktk.errors import BackendError
from ktk.experts.layout import PANEL, round_up
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.placement.blocks import in_whole_panels
from ktk.placement.parts import Part, whole_part

# Told of an expert that moved: its number, and its address in each table, or None where it is
# absent; whether no call uses it.
Listener = Callable[[int, Mapping[str, int] | None, bool], None]
# Told whether its bytes are there: "here", "coming" or "lost".
ArrivalListener = Callable[[int, str], None]


class ExpertStore:
    """The experts of one layer, each where it lies, in a span of its own, or absent.

    A span is one piece of memory with all of an expert: of packed experts what a packed directory
    holds, of blocks gate, up, down and the biases one behind the other, 64-byte aligned. Safe to
    use from several threads.

    Parameters
    ----------
    experts : StoredExperts
        Spec, formats, and where experts are at first; those whose ``order`` is -1 are absent.
    fetch : (expert: int) -> uint8 (span_bytes,), 64-byte aligned, or None
        Brings an absent expert that a call needs; it then stays. None: the call is a BackendError.
        It runs under the store's lock.
    """

    def __init__(
        self, experts: StoredExperts, fetch: Callable[[int], np.ndarray] | None = None
    ) -> None:
        self.experts = in_whole_panels(experts)
        self.spec = experts.spec
        self.part: Part = whole_part(self.experts)
        self.fetch = fetch
        self.offsets, self.span_bytes = _offsets(self.experts, self.part)
        places = [experts.place_or_none(e) for e in range(self.spec.num_experts)]
        self._addresses = [None if at is None else self._lying(at) for at in places]
        self._spans: dict[int, np.ndarray] = {}  # keeps the memory of those that were placed
        self._pins = np.zeros(self.spec.num_experts, np.int64)  # calls that use each expert
        self._leaving = np.zeros(self.spec.num_experts, np.int64)  # place()s that wait for them
        self._changed = threading.Condition()
        self._listeners: list[Listener] = []
        self._arrival_listeners: list[ArrivalListener] = []

    @classmethod
    def absent(cls, spec: MoESpec) -> ExpertStore:
        """A store of packed experts of which none is in memory yet.

        ValueError if the spec's format does not lie in panels.
        """
        unused = aligned_buffer(spec.layout.expert_bytes).reshape(1, -1)  # never touched
        order = np.full(spec.num_experts, -1)
        return cls(StoredExperts.of_panels(spec, unused, order))

    @property
    def num_listeners(self) -> int:
        """Operators that are told where experts are."""
        return len(self._listeners)

    @property
    def present(self) -> np.ndarray:
        """bool (num_experts,): which experts are in memory now."""
        return np.array([address is not None for address in self._addresses])

    def address(self, expert: int) -> int | None:
        """Where the expert's first matrix begins, None for an absent one.

        It may move unless it is pinned.
        """
        addresses = self._addresses[expert]
        return None if addresses is None else next(iter(addresses.values()))

    def attach(self, listener: Listener, on_arrival: ArrivalListener) -> None:
        """Tell ``listener`` where every expert is, now and after each change, and ``on_arrival``
        when one begins to be read there, and when that ends; none may be coming now.
        """
        with self._changed:
            self._listeners.append(listener)
            self._arrival_listeners.append(on_arrival)
            for expert, addresses in enumerate(self._addresses):
                listener(expert, addresses, False)

    def place(
        self,
        expert: int,
        span: np.ndarray | None,
        is_coming: bool = False,
        is_unused: bool = False,
    ) -> None:
        """From now on the expert is in ``span``, or, None, absent. Waits until no call uses it
        where it was.

        span : uint8 (span_bytes,), C-contiguous, 64-byte aligned; kept while it is used. ValueError
        for any other. is_coming : its bytes are not there yet: calls that use it wait until
        ``arrive``. is_unused : no call uses the expert, and none will until this returns, which
        then waits for nobody.
        """
        with self._changed:
            self._leaving[expert] += 1  # new calls wait, or a busy expert could never move
            try:
                if not is_unused:
                    self._changed.wait_for(lambda: not self._pins[expert])
                for on_arrival in self._arrival_listeners:
                    on_arrival(expert, "coming" if is_coming else "here")
                self._put(expert, span, is_unused)
            finally:
                self._leaving[expert] -= 1
                self._changed.notify_all()

    def follow(self, expert: int, span: np.ndarray | None) -> None:
        """The expert has been placed so by who told the listeners itself. It must be unused."""
        with self._changed:
            self._set(expert, span)

    def arrive(self, expert: int, is_lost: bool = False) -> None:
        """The bytes of an expert that was coming are there, or, lost, will not be: calls that use
        it then end with AwaitedInVain. Waits for nobody.
        """
        for on_arrival in self._arrival_listeners:
            on_arrival(expert, "lost" if is_lost else "here")

    def copy_of(self, expert: int) -> np.ndarray:
        """A new span with a present expert's bytes;
        for one that lies where the store was made from.
        """
        at = self.experts.place(expert)
        span = aligned_buffer(self.span_bytes)
        if self.experts.spans is not None:
            span[:] = self.experts.spans[at]
            return span
        for table, offset in self.offsets.items():
            raw = np.ascontiguousarray(getattr(self.part, table)[at]).view(np.uint8).reshape(-1)
            span[offset : offset + raw.size] = raw
        return span

    def alone(self, expert: int) -> StoredExperts:
        """A present expert where it lies now, the others absent; it must not move while that is
        used. BackendError for one that is absent.
        """
        span = self._spans.get(expert)
        if span is None:
            self.experts.place(expert)
            return self.experts
        order = np.full(self.spec.num_experts, -1, np.int64)
        order[expert] = 0
        if self.spec.is_packed:
            return StoredExperts.of_panels(self.spec, span.reshape(1, -1), order)

        def lying(table: str, like: np.ndarray) -> np.ndarray:
            raw = span[self.offsets[table] :][: like[0].nbytes]
            return raw.view(like.dtype).reshape(1, *like.shape[1:])

        found: dict[str, Any] = {
            name: dataclasses.replace(matrix, data=lying(name, matrix.data))
            for name, matrix in self.experts.matrices.items()
        }
        for name, bias in self.experts.biases.items():
            found[f"{name}_bias"] = lying(f"{name}_bias", bias)
        return dataclasses.replace(self.experts, order=order, **found)

    @contextmanager
    def pinned(self, topk_ids: np.ndarray, skip: np.ndarray | None) -> Iterator[None]:
        """Every expert that a call uses is present and stays where it is.

        topk_ids : int64, any shape; ids outside 0..num_experts-1 and those of ``skip``, bool
        (num_experts,), are not used. BackendError names the experts that are absent and have no
        fetch.
        """
        used = np.unique(topk_ids)
        used = used[(used >= 0) & (used < self.spec.num_experts)]
        if skip is not None:
            used = used[~skip[used]]
        with self._changed:
            self._changed.wait_for(lambda: not self._leaving[used].any())
            absent = [e for e in used.tolist() if self._addresses[e] is None]
            if absent and self.fetch is None:
                named = ", ".join(map(str, absent))
                raise BackendError(f"experts {named} are not in memory: bring them back first")
            for expert in absent:
                assert self.fetch is not None
                self._put(expert, self.fetch(expert))
            self._pins[used] += 1
        try:
            yield
        finally:
            with self._changed:
                self._pins[used] -= 1
                self._changed.notify_all()

    def _lying(self, at: int) -> dict[str, int]:
        return {table: int(getattr(self.part, table)[at].ctypes.data) for table in self.offsets}

    def _put(self, expert: int, span: np.ndarray | None, is_unused: bool = False) -> None:
        if span is not None:
            if span.dtype != np.uint8 or span.shape != (self.span_bytes,):
                raise ValueError(
                    f"span is {span.dtype} {span.shape}: must be uint8 ({self.span_bytes},)"
                )
            if not span.flags.c_contiguous or span.ctypes.data % 64:
                raise ValueError("span must be C-contiguous and 64-byte aligned")
        before = self._spans.get(expert)  # lives until no table names it
        self._set(expert, span)
        addresses = self._addresses[expert]
        for listener in self._listeners:
            listener(expert, addresses, is_unused)
        del before

    def _set(self, expert: int, span: np.ndarray | None) -> None:
        if span is None:
            self._addresses[expert] = None
            self._spans.pop(expert, None)
            return
        begin = int(span.ctypes.data)
        self._addresses[expert] = {table: begin + at for table, at in self.offsets.items()}
        self._spans[expert] = span


def _offsets(experts: StoredExperts, part: Part) -> tuple[dict[str, int], int]:
    """Where each table's bytes are in a span, and the span's size."""
    spec = experts.spec
    if spec.is_packed:
        layout = spec.layout
        found = {layout.projections[0]: 0, "down": layout.down_offset}
        for name in layout.projections:
            offset = getattr(layout, f"{name}_bias_offset")
            if offset >= 0:
                found[f"{name}_bias"] = offset
        return found, layout.expert_bytes
    found, at = {}, 0
    for table in (*experts.matrices, *(f"{name}_bias" for name in experts.biases)):
        found[table] = at
        at += round_up(getattr(part, table)[0].nbytes, 4 * PANEL)
    return found, at
