"""HybridMoE: a layer's experts, some of them on a device of torch's, the rest on the CPU.

A call's pairs of token and expert go to where the expert is. Both sides work at once: a device that
works on its own is asked first, and then the CPU's part runs in the caller's thread; where torch
computes on the CPU itself, the CPU's part runs in the process's queue beside it. Both make float32
sums, which are added and rounded once.

Who is on the device may change while calls run (``swap``). A call takes the ``Residents`` of its
beginning, which never change, and a slot is written only when no call has residents that name it.
So no call sees half a swap, and a child forked in the middle of one has a whole set.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ktk import fork
from ktk.backends import Operands
from ktk.errors import BackendError
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import to_f32
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.log import warn_once
from ktk.machine import queue as fifo
from ktk.machine.streams import streams_of
from ktk.ops.device_experts import DeviceExperts
from ktk.ops.hybrid_stream import HybridStream
from ktk.ops.inputs import Call, as_add, as_call, as_mask, is_tensor
from ktk.ops.moe import MoE
from ktk.ops.stream_moe import BufferPool, Streams
from ktk.ops.streamed import AnyMoE, StreamedMoE
from ktk.placement.masks.updates import Update


class Residents:
    """Which experts the device has, and where.

    slots : int64 (num_experts,), -1 for an expert of the CPU. mask : bool (num_experts,), True on
    the device. Neither changes.
    """

    def __init__(self, slots: np.ndarray) -> None:
        self.slots, self.mask = slots, slots >= 0
        self.slots.flags.writeable = self.mask.flags.writeable = False
        self.count = int(self.mask.sum())
        self.calls = 0  # that use it now


class HybridMoE:
    """``MoE`` with some of its experts on a device.

    Parameters
    ----------
    experts : StoredExperts or StreamedMoE
        What the CPU runs. Those of the mask may be absent (``StoredExperts.order``); they are then
        never swapped. Of streamed experts those of the device are read once, and again if they
        come back to the CPU.
    mask : bool (num_experts,)
        True on the device.
    device : torch.device or str
        "cpu" is one, too: for tests.
    dtype : torch.dtype
        Of the experts on the device, torch.bfloat16 or torch.float32.
    gpu_experts : StoredExperts or None
        Where the experts of the mask are read from, once; None: from ``experts``.
    update : ktk.placement.masks.updates.Update or None
        Says after each call which experts to swap to; None: only ``swap`` changes them. An expert
        that leaves must be in the CPU's memory.
    method, num_threads
        Of the CPU's part, as ``MoE`` takes them.
    streams : Streams or None
        The device's; None: those it has. With them calls of few tokens, on the device, wait for
        nothing and may be captured in a graph, unless ``update`` must know the experts or the CPU's
        part needs Python.
    pool : BufferPool or None
        Pinned memory for that, shared by a model's layers; None: its own.

    Raises
    ------
    ValueError for a mask of another length or dtype and for an expert that is nowhere, BackendError
    if the device has no memory or nothing runs the CPU's part.
    """

    _is_following: bool  # a thread swaps to what the update wants

    def __init__(
        self,
        experts: StoredExperts | StreamedMoE,
        mask: Any,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        gpu_experts: StoredExperts | None = None,
        update: Update | None = None,
        method: str = "auto",
        num_threads: int | None = None,
        streams: Streams | None = None,
        pool: BufferPool | None = None,
    ) -> None:
        self.spec = experts.spec
        on_device = self._checked(mask)
        source = experts if gpu_experts is None else gpu_experts
        _check_present(experts, np.flatnonzero(~on_device), "the CPU is to run")
        _check_present(source, np.flatnonzero(on_device), "the device is to hold")
        if update is not None:
            _check_present(experts, np.arange(self.spec.num_experts), "may be swapped and")
        self.update = update
        # Where swaps take experts from, None: from ``moe``, whose panels can be decoded; repacked
        # blocks cannot.
        is_panels = isinstance(experts, StoredExperts) and experts.is_packed
        self._blocks = None if is_panels else experts
        self.device_experts = DeviceExperts(
            self.spec, int(on_device.sum()), torch.device(device), dtype
        )
        slots = np.full(self.spec.num_experts, -1, np.int64)
        for slot, expert in enumerate(np.flatnonzero(on_device).tolist()):
            self.device_experts.write(slot, _weights(source, expert))
            slots[expert] = slot
        self.device_experts.synchronise()
        self.moe: AnyMoE = (
            experts
            if isinstance(experts, StreamedMoE)
            else MoE(experts, method=method, num_threads=num_threads)
        )
        self._residents = Residents(slots)
        self._stream = self._stream_side(streams or streams_of(self.device), pool)
        self._renew()
        self._publish(self._residents)
        _all.add(self)

    @property
    def mask(self) -> np.ndarray:
        """bool (num_experts,): True on the device now; a copy."""
        return self._residents.mask.copy()

    @property
    def num_on_device(self) -> int:
        """Experts of the device now."""
        return self._residents.count

    @property
    def device(self) -> torch.device:
        return self.device_experts.device

    def forward(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, *, add: Any = None
    ) -> Any:
        """Sum over each token's slots of weight * expert(hidden).

        hidden_states : (..., hidden_size), float32, float16 or bfloat16; an array, or a tensor on
            any device.
        topk_ids : (num_tokens, top_k), any integer type; an id outside 0..num_experts-1 adds
            exactly zero. topk_weights : likewise, any float type, used as float32.
        add : float32 (num_tokens, hidden_size) on the CPU, or None; added before the rounding.
        Returns a new (num_tokens, hidden_size) array, or tensor on hidden_states' device, of its
        dtype. Where no expert of the device is asked for, it has the bits of ``MoE``; else it
        differs by rounding, and by that of activations, which formats of integers round on the
        CPU.
        Raises TypeError / ValueError naming the argument that does not fit.
        """
        given = hidden_states, topk_ids, topk_weights
        if self._stream is not None and add is None and self._stream.takes(*given):
            return self._stream.forward(*given)
        call = as_call(*given, self.spec.hidden_size, None)
        result = self._result(hidden_states, call, as_add(add, call.hidden.shape))
        if self.update is not None:
            self._follow(self.update, call.topk_ids)
        return result

    __call__ = forward

    def _result(self, hidden_states: Any, call: Call, add: np.ndarray | None) -> Any:
        with self._using() as residents:
            valid = (call.topk_ids >= 0) & (call.topk_ids < self.spec.num_experts)
            slots = np.where(valid, residents.slots[np.where(valid, call.topk_ids, 0)], -1)
            if (slots < 0).all():
                skip = residents.mask if residents.count else None
                own = call.hidden, call.topk_ids, call.topk_weights, skip, call.out, add
                self.moe.run(Operands(*own))
                return call.result if call.device == "numpy" else call.result.to(call.device)
            given = hidden_states if is_tensor(hidden_states) else _tensor(call)
            rows = given.detach().reshape(call.hidden.shape)
            is_all = bool((valid == (slots >= 0)).all())  # nothing is left to the CPU
            sums = self._both(rows, call, slots, None if is_all else residents.mask)
            if add is not None:
                sums.add_(torch.from_numpy(add).to(self.device))
        return _rounded(sums, call)

    def _both(
        self, rows: torch.Tensor, call: Call, slots: np.ndarray, skip: np.ndarray | None
    ) -> torch.Tensor:
        """float32 (num_tokens, hidden_size) on the device. skip : None: the CPU has nothing."""
        places = torch.from_numpy(slots), torch.from_numpy(call.topk_weights)
        if skip is None:
            return self.device_experts.forward(rows, *places)
        hidden = to_f32(call.hidden)
        host = np.empty_like(hidden)

        def on_cpu() -> None:
            self.moe.run(Operands(hidden, call.topk_ids, call.topk_weights, skip, host))

        if self.device.type == "cpu":
            ticket = fifo.submit(on_cpu)
            try:
                sums = self.device_experts.forward(rows, *places)
            finally:
                ticket.wait()
        else:
            sums = self.device_experts.forward(rows, *places)  # has not waited for the device
            ticket = fifo.run(on_cpu)
        ticket.take()
        return sums.add_(torch.from_numpy(host).to(self.device))

    def _stream_side(self, streams: Streams | None, pool: BufferPool | None) -> HybridStream | None:
        """None where a call must be waited for."""
        if streams is None or self.update is not None or not isinstance(self.moe, MoE):
            return None
        try:
            return HybridStream(self.moe, self.device_experts, streams, pool or BufferPool())
        except BackendError as error:
            warn_once("hybrid-stream", "calls wait for the device: %s", error)
            return None

    # -- who is on the device ------------------------------------------------------------------

    def swap(self, mask: Any) -> None:
        """Have the experts of another mask on the device. Calls run on meanwhile.

        mask : bool (num_experts,), at most as many as the first one.
        Those that leave run on the CPU first, then the new ones take their slots: until the end a
        call may find fewer on the device, never a wrong one. New ones wait beside the slots, so the
        device needs memory for them twice.
        Raises ValueError for a mask that does not fit and BackendError if the device has no memory
        or if one that leaves is not in the CPU's memory; the old set then stays.
        """
        wanted = self._checked(mask)
        if int(wanted.sum()) > self.device_experts.num_slots:
            raise ValueError(
                f"the mask names {int(wanted.sum())} experts: the device has room for "
                f"{self.device_experts.num_slots}"
            )
        with self._swapping:
            before, stored = self._residents, self._blocks or self.moe.packed
            leaving = np.flatnonzero(before.mask & ~wanted)
            entering = np.flatnonzero(wanted & ~before.mask)
            _check_present(stored, leaving, "leave the device and")
            if not len(leaving) + len(entering):
                return
            device = self.device_experts
            staged = [device.staged(_weights(stored, e)) for e in entering.tolist()]
            slots = np.where(wanted, before.slots, -1)
            self._publish(Residents(slots.copy()))
            free = np.setdiff1d(np.arange(device.num_slots), slots)
            device.synchronise()  # what calls asked for before they ended
            for slot, expert, planes in zip(free.tolist(), entering.tolist(), staged, strict=False):
                device.write(slot, planes)
                slots[expert] = slot
            device.synchronise()
            self._publish(Residents(slots))

    def _follow(self, update: Update, topk_ids: np.ndarray) -> None:
        """Swap to what the update wants after a call; not while another thread does."""
        with self._changed:
            if self._is_following:
                return
            self._is_following = True
        try:
            wanted = update.wanted(topk_ids, self._residents.mask)
            if wanted is not None:
                self.swap(wanted)
        finally:
            self._is_following = False

    def _checked(self, mask: Any) -> np.ndarray:
        found = as_mask(mask, self.spec.num_experts)
        if found is None:
            raise ValueError(f"mask is None: must be bool ({self.spec.num_experts},)")
        return found

    @contextmanager
    def _using(self) -> Iterator[Residents]:
        changed = self._changed
        with changed:
            residents = self._residents
            residents.calls += 1
        try:
            yield residents
        finally:
            with changed:
                residents.calls -= 1
                changed.notify_all()

    def _publish(self, residents: Residents) -> None:
        """From now on calls take these; returns when none has those of before."""
        if isinstance(self.moe, StreamedMoE):
            self.moe.elsewhere = residents.mask
        with self._changed:
            before, self._residents = self._residents, residents
            self._changed.wait_for(lambda: not before.calls)
        if self._stream is not None:
            self._stream.publish(residents.slots)

    def _renew(self) -> None:
        """Locks that nobody holds, as at first; in a forked child the calls of others are gone."""
        self._changed = threading.Condition()
        self._swapping = threading.Lock()
        self._residents.calls = 0
        self._is_following = False

    def __repr__(self) -> str:
        return (
            f"HybridMoE({self.num_on_device} of {self.spec.num_experts} experts on {self.device}, "
            f"{self.device_experts.dtype}; {self.moe!r})"
        )


_all: weakref.WeakSet[HybridMoE] = weakref.WeakSet()


@fork.in_child
def _renew_all() -> None:
    for hybrid in list(_all):
        hybrid._renew()


def _weights(experts: StoredExperts | StreamedMoE, expert: int) -> ExpertWeights:
    if isinstance(experts, StreamedMoE):
        return experts.weights(expert)
    return expert_weights(experts, expert)


def _check_present(experts: StoredExperts | StreamedMoE, wanted: np.ndarray, what: str) -> None:
    if isinstance(experts, StreamedMoE):
        return  # it reads those that are not
    absent = [e for e in wanted.tolist() if experts.place_or_none(e) is None]
    if absent:
        raise BackendError(
            f"experts {', '.join(map(str, absent))} {what} are not in the CPU's memory: load all"
        )


def _tensor(call: Call) -> torch.Tensor:
    """An array's rows as a tensor."""
    rows = torch.from_numpy(call.hidden)
    return rows.view(torch.bfloat16) if rows.dtype == torch.uint16 else rows


def _rounded(sums: torch.Tensor, call: Call) -> Any:
    """float32 sums as the caller's kind, dtype and device."""
    if call.device == "numpy":
        out = _tensor(call)
        torch.from_numpy(call.out).view(out.dtype).copy_(sums)
        return call.result
    return sums.to(call.device, call.result.dtype)
