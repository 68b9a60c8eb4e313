"""A layer's experts run while only some are in memory, with the bits of all in memory.

A call's experts are read first, then the operator runs. A call with more experts than fit goes in
waves: each wave runs its experts' rows, one for each (token, slot), and the rows are summed when
all are there, in top-k order and fused, as the kernels sum them. So no expert is read twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk.experts.fma import fma
from ktk.experts.formats.floats import f32_to_bf16, to_f32
from ktk.ops.inputs import as_add, as_hidden, as_mask, as_routing, new_like
from ktk.ops.moe import MoE
from ktk.placement.residency.slots import Slots
from ktk.placement.residency.states import ExpertState

WAVE_BYTES = 64 << 20  # of the rows that wait for their sum: more tokens are cut


class StreamedMoE:
    """``MoE`` over experts that come and go.

    moe : over the layer's ExpertStore, the one ``slots`` has. layer : its number there.
    """

    def __init__(self, moe: MoE, slots: Slots, layer: int) -> None:
        self.moe, self.slots, self.layer = moe, slots, layer
        self.spec = moe.spec

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
        more = as_add(add, hidden.shape)
        result, out = new_like(hidden_states, hidden.shape)
        is_used = (ids >= 0) & (ids < self.spec.num_experts)
        if mask is not None:
            is_used[is_used] = ~mask[ids[is_used]]
        experts = np.unique(ids[is_used]).tolist()
        if len(experts) <= self.slots.room(self.layer):
            with self.slots.using(self.layer, experts, self._scores(ids, weights, is_used)):
                self.moe.run(hidden, ids, weights, mask, out, more)
            return result
        own_ids = np.where(is_used, ids, -1)
        step = max(1, WAVE_BYTES // (4 * ids.shape[1] * self.spec.hidden_size))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            total = self._in_waves(hidden[part], own_ids[part], weights[part])
            if more is not None:
                total += more[part]
            out[part] = _as_dtype(total, out.dtype)
        return result

    __call__ = forward

    def _scores(self, ids: np.ndarray, weights: np.ndarray, is_used: np.ndarray) -> np.ndarray:
        """float32 (num_experts,): the largest weight over the tokens."""
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
            with self.slots.using(self.layer, wave, self._scores(ids, weights, is_used)):
                own = np.ascontiguousarray(ids[token, slot][:, None])
                y = np.empty((len(token), hidden.shape[1]), np.float32)
                self.moe.run(x[token], own, np.ones(own.shape, np.float32), None, y)
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


def _as_dtype(total: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Rounded half to even, as the kernels store it; bf16 as bits."""
    if dtype == np.uint16:
        return f32_to_bf16(total)
    return total.astype(dtype, copy=False)
