"""A layer's experts run while only some are in memory, with the bits of all in memory.

The operator runs experts that are there while the others are read, and those as they come. A call
with more experts than fit goes in waves: each wave runs its experts' rows, one for each (token,
slot), and the rows are summed when all are there, in top-k order and fused, as the kernels sum
them. So no expert is read twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk._cy import native_module
from ktk.backends import Operands
from ktk.errors import AwaitedInVain, BackendError
from ktk.experts.dequantise import expert_weights
from ktk.experts.fma import fma
from ktk.experts.formats.floats import f32_to_bf16, to_f32
from ktk.experts.stored import ExpertWeights
from ktk.ops.inputs import as_add, as_hidden, as_mask, as_routing, new_like
from ktk.ops.moe import MoE
from ktk.placement.residency.slots import Slots
from ktk.placement.residency.states import ExpertState

WAVE_BYTES = 128 << 20  # of the rows that wait for their sum: more tokens are cut


class Foresight:
    """The next layer's router beside a layer, given its input: most of what it chooses is what the
    next layer will use.

    native : for ``native.DecoderLayer``. is_on : whether it is asked.
    """

    def __init__(self) -> None:
        module: Any = native_module()
        self.native, self.is_on = module.Foresight(), False
        self._routed: Any = None

    def follow(self, routed: Any) -> None:
        """routed : the next layer's ``RoutedExperts``."""
        self.native.follow(routed)
        self._routed = routed

    def turn(self, is_on: bool) -> None:
        """Without a router it stays off."""
        if self._routed is not None and is_on != self.is_on:
            self.native.turn(is_on)
            self.is_on = is_on


class StreamedMoE:
    """``MoE`` over experts that come and go.

    moe : over the layer's ExpertStore, the one ``slots`` has. layer : its number there. where : the
    directory or file that has them all, for messages.
    elsewhere : bool (num_experts,) or None; experts that run on a device, which nobody reads ahead.
    """

    is_streamed = True

    def __init__(self, moe: MoE, slots: Slots, layer: int, where: str = "the disk") -> None:
        self.moe, self.slots, self.layer, self.where = moe, slots, layer, where
        self.spec, self.backend, self.kernel = moe.spec, moe.backend, moe.kernel
        self.bits_per_weight, self.num_threads = moe.bits_per_weight, moe.num_threads
        self.runner = moe.runner
        self.following: StreamedMoE | None = None  # the next layer, over the same slots
        self.foresight = Foresight()
        self.elsewhere: np.ndarray | None = None

    def forward(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        skip: Any = None,
        add: Any = None,
    ) -> Any:
        """As ``MoE.forward``, and the same bits.

        CheckpointError if an expert cannot be read, BackendError if pinned ones leave no room.
        """
        hidden = as_hidden(hidden_states, self.spec.hidden_size)
        ids, weights = as_routing(topk_ids, topk_weights, len(hidden))
        mask = as_mask(skip, self.spec.num_experts)
        result, out = new_like(hidden_states, hidden.shape)
        self.run(Operands(hidden, ids, weights, mask, out, as_add(add, hidden.shape)))
        return result

    __call__ = forward

    def run(self, given: Operands) -> None:
        """As ``MoE.run``, and the same bits. Raises as ``forward``."""
        hidden, ids, weights, skip, out, add = given
        is_used = (ids >= 0) & (ids < self.spec.num_experts)
        if skip is not None:
            is_used[is_used] = ~skip[ids[is_used]]
        experts = np.unique(ids[is_used]).tolist()
        if len(experts) <= self.slots.room(self.layer):
            scores = self._scores(ids, weights, is_used)
            self._run_held(experts, scores, given)
            return
        own_ids = np.where(is_used, ids, -1)
        step = max(1, WAVE_BYTES // (4 * ids.shape[1] * self.spec.hidden_size))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            total = self._in_waves(hidden[part], own_ids[part], weights[part])
            if add is not None:
                total += add[part]
            out[part] = _as_dtype(total, out.dtype)

    def come(self) -> None:
        """Begin to read all experts that are not there."""
        many = self.spec.num_experts
        wanted = range(many) if self.elsewhere is None else np.flatnonzero(~self.elsewhere).tolist()
        self.slots.prefetch(self.layer, wanted, most=many)

    def weights(self, expert: int) -> ExpertWeights:
        """One expert, dequantised to float32. CheckpointError if it cannot be read."""
        with self.slots.using(self.layer, [expert]):
            return expert_weights(self.slots.store(self.layer).alone(expert), expert)

    def _run_held(self, experts: list[int], scores: np.ndarray | None, given: Operands) -> None:
        """``MoE.run`` while they are read."""
        held = self.slots.hold(self.layer, experts, scores, reads_on=True)
        assert held is not None
        try:
            if self.following is not None and 2 * len(experts) > self.spec.num_experts:
                self.following.come()  # a prompt: it will use nearly all of them, too
            self.moe.run(given)
        except AwaitedInVain:
            pass
        else:
            return
        finally:
            self.slots.release(held)
        with self.slots.using(self.layer, experts, scores):  # once more, or why it cannot be read
            self.moe.run(given)

    def linear(self, projection: str, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        """As ``MoE.linear``, and the same bits. Raises as ``forward``, too."""
        width = self.spec.hidden_size if projection == "down" else self.spec.intermediate_size
        columns = width * (1 + (projection == "gate_up" and self.spec.has_gate))
        ids = np.asarray(expert_ids)
        out = np.empty((len(ids), columns), np.float32)
        for wave in self._waves(ids):
            at = np.flatnonzero(np.isin(ids, wave))
            with self.slots.using(self.layer, wave):
                out[at] = self.moe.linear(projection, np.asarray(x)[at], ids[at])
        return out

    @property
    def packed(self) -> Any:
        """BackendError: they are never in memory all at once."""
        raise BackendError(
            f"experts of {self.where} come into memory only as tokens need them: load the model "
            "without a limit of expert memory, or take them from there"
        )

    def __repr__(self) -> str:
        return f"Streamed{self.moe!r}"

    def _scores(
        self, ids: np.ndarray, weights: np.ndarray, is_used: np.ndarray
    ) -> np.ndarray | None:
        """float32 (num_experts,): the largest weight over the tokens; None if nobody looks."""
        if not self.slots.wants_scores:
            return None
        scores = np.zeros(self.slots.num_experts, np.float32)
        np.maximum.at(scores, ids[is_used], weights[is_used])
        return scores

    def _in_waves(self, hidden: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float32 (num_tokens, hidden_size). ids : -1 where no expert is used."""
        rows = np.empty((*ids.shape, hidden.shape[1]), np.float32)  # (tokens, top_k, H)
        x = to_f32(hidden)
        for wave in self._waves(ids):
            is_used = np.isin(ids, wave)
            token, slot = np.nonzero(is_used)
            own = np.ascontiguousarray(ids[token, slot][:, None])
            y = np.empty((len(token), hidden.shape[1]), np.float32)
            scores, ones = self._scores(ids, weights, is_used), np.ones(own.shape, np.float32)
            self._run_held(wave, scores, Operands(x[token], own, ones, None, y))
            rows[token, slot] = y
        total = np.zeros(hidden.shape, np.float32)
        for k in range(ids.shape[1]):
            at = np.flatnonzero(ids[:, k] >= 0)
            total[at] = fma(rows[at, k], weights[at, k, None], total[at])
        return total

    def _waves(self, ids: np.ndarray) -> list[list[int]]:
        """Who is in memory first."""
        experts = np.unique(ids[ids >= 0]).tolist()
        here = (ExpertState.RESIDENT, ExpertState.PINNED)
        experts.sort(key=lambda e: self.slots.state(self.layer, e) not in here)
        room = self.slots.room(self.layer)
        return [experts[i : i + room] for i in range(0, len(experts), room)]


AnyMoE = MoE | StreamedMoE


class Visit:
    """What a native call of a decoder layer asks for experts that come and go: by ``bring`` while
    it runs, which must not wait for other calls, as these may wait for the thread pool that it has;
    by ``wait`` between two tries.

    error : what ``bring`` raised, for ``wait`` to raise.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._held: dict[StreamedMoE, list[int]] = {}  # keys in its slots
        self._wanted: tuple[StreamedMoE, list[int], np.ndarray | None] | None = None

    def bring(
        self, owner: StreamedMoE, ids: list[int], weights: list[float], foretold: list[int]
    ) -> bool:
        """Whether the experts are in memory or on their way now, until ``end``. ids : of all rows;
        a router chose them, so each is an expert's. foretold : likewise, of the next layer, those
        that are not in memory.
        """
        if owner in self._held:
            return True  # a try before has routed the same rows
        scores = None
        if owner.slots.wants_scores:
            scores = np.zeros(owner.slots.num_experts, np.float32)
            np.maximum.at(scores, ids, np.array(weights, np.float32))
        self._wanted = owner, ids, scores
        held = owner.slots.hold(owner.layer, ids, scores, waits=False, reads_on=True)
        if held is None:
            return False
        self._held[owner] = held
        owner.foresight.turn(owner.slots.looks_ahead)
        if foretold and owner.following is not None:
            owner.slots.foresee(owner.following.layer, foretold)
        return True

    def wait(self) -> None:
        """Until the experts of the last ``bring`` are in memory: those that it could not have, or
        that were awaited in vain. Raises as ``Slots.using``.
        """
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        assert self._wanted is not None
        owner, ids, scores = self._wanted
        if (before := self._held.pop(owner, None)) is not None:
            owner.slots.release(before)
        held = owner.slots.hold(owner.layer, ids, scores)
        assert held is not None
        self._held[owner] = held

    def end(self) -> None:
        """The native call is over."""
        for owner, held in self._held.items():
            owner.slots.release(held)
        self._held.clear()


def _as_dtype(total: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Rounded half to even, as the kernels store it; bf16 as bits."""
    if dtype == np.uint16:
        return f32_to_bf16(total)
    return total.astype(dtype, copy=False)
