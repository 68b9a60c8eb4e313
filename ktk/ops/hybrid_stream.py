"""A hybrid layer's passes on a CUDA stream: both sides work at once, and the caller waits for
neither.

The device's experts go on the caller's stream, the CPU's on one beside it, whose host functions
would hold up the device otherwise. No size depends on what was routed, so a graph may capture a
pass. Who is on the device stands in two tables that passes read when they run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ktk.errors import BackendError
from ktk.fork import Lock
from ktk.ops.device_experts import DeviceExperts
from ktk.ops.inputs import is_tensor
from ktk.ops.moe import MoE
from ktk.ops.stream_moe import BufferPool, StreamMoE, Streams, check_tensors

MOST_TOKENS = (
    512  # more are bound by what is computed, not by waiting: pinned memory is not for them
)


class HybridStream:
    """``HybridMoE`` on streams.

    Parameters
    ----------
    moe : MoE
        What the CPU runs.
    device_experts : DeviceExperts
    streams : Streams
        Of the device.
    pool : BufferPool
        Shared by the layers of a model.

    Raises
    ------
    BackendError if either side cannot run without being waited for.
    """

    def __init__(
        self, moe: MoE, device_experts: DeviceExperts, streams: Streams, pool: BufferPool
    ) -> None:
        if not device_experts.is_grouped:
            raise BackendError("experts on a CUDA stream: torch has no grouped product for them")
        self._on_device, self._streams = device_experts, streams
        num_experts = moe.spec.num_experts
        self._skip = np.zeros(num_experts, bool)
        # Of ids outside the last entry, which stays.
        self._slots = torch.full((num_experts + 1,), -1, device=device_experts.device)
        self._on_cpu = StreamMoE(moe, streams, self._skip, pool, turn=0)
        self._beside = pool.beside(streams)
        self._lock = Lock()  # a pass is put on its stream whole

    def publish(self, slots: np.ndarray) -> None:
        """Passes that begin from now on take these; those before have ended. slots : int64
        (num_experts,), -1 for an expert of the CPU.

        A graph that was captured takes them from its next replay on; none may run meanwhile.
        """
        with self._lock:
            self._on_device.synchronise()
            self._skip[:] = slots >= 0
            with torch.inference_mode(False):
                self._slots[:-1].copy_(torch.from_numpy(slots.copy()))
            self._on_device.synchronise()

    def takes(self, hidden_states: Any, topk_ids: Any, topk_weights: Any) -> bool:
        """Whether a call can be put on the stream that is current where its tensors are."""
        here = self._on_device.device
        if any(
            not is_tensor(x) or x.device != here for x in (hidden_states, topk_ids, topk_weights)
        ):
            return False
        num_tokens = hidden_states.shape[:-1].numel()
        return num_tokens <= MOST_TOKENS or self._streams.is_capturing(self._streams.current())

    @torch.no_grad()
    def forward(self, hidden_states: Any, topk_ids: Any, topk_weights: Any) -> torch.Tensor:
        """``HybridMoE.forward`` of tensors on the device; a new tensor, there when the current
        stream has come so far. What failed in passes that have run is raised.
        """
        rows = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
        spec, on = self._on_cpu.moe.spec, self._streams
        top_k = topk_ids.shape[-1]
        check_tensors(rows, topk_ids, topk_weights, spec.hidden_size, top_k)
        ids, weights = topk_ids.long(), topk_weights.float()
        sums = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        out = torch.empty_like(rows)

        def on_device() -> None:
            inside = torch.where((ids >= 0) & (ids < spec.num_experts), ids, spec.num_experts)
            sums.copy_(self._on_device.forward(rows, self._slots[inside], weights))

        with self._lock:
            stream, floats = on.current(), rows.float()  # two float32 sums, rounded once
            on.wait(self._beside, on.mark(stream))
            given = self._on_cpu.submit(self._beside, floats, ids, weights)
            on.work(stream, on_device)
            host = self._on_cpu.finish(given, stream, rows.device)
            on.work(stream, lambda: out.copy_(sums.add_(host)))
        return out
