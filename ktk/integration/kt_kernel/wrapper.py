"""KTMoEWrapper: the KT-Kernel-compatible face of ``ktk.MoE``. Same arguments, same calls, checked.

What it adds to the operator: experts kept on a GPU (a mask, updated in place), submit_forward and
sync_forward around one process-wide worker, staging buffers, deferred experts, prefill in chunks.

Deferral: output(n) = immediate experts of layer n + deferred experts of layer n-1, added in float32
before the one rounding. A deferred result is used once, by the very next submit of the same thread,
if that is layer_idx + 1 with as many tokens of the same width; else it is dropped, as KT-Kernel
drops it when a dense layer lies between. So what an abandoned sequence left behind is never added
to another, and the last MoE layer should have max_deferred_experts_per_token=0.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ktk import backends
from ktk.backends import Operands
from ktk.experts.formats.floats import to_f32
from ktk.experts.rotation import Rotation
from ktk.experts.stored import StoredExperts
from ktk.integration.kt_kernel.arguments import (
    check_mode,
    check_top_k,
    checked_int,
    checked_nodes,
    ktk_method,
    mask_of,
    swiglu_activation,
)
from ktk.integration.kt_kernel.gpu_buffers import WeightWriter
from ktk.integration.kt_kernel.residency import Residency
from ktk.integration.kt_kernel.selection import select_deferred_experts
from ktk.integration.kt_kernel.staging import Buffers
from ktk.integration.kt_kernel.stream_side import Sizes, StreamSide, forget_deferred
from ktk.integration.kt_kernel.stream_side import pool as stream_buffers
from ktk.integration.kt_kernel.weights import LayerWeights
from ktk.machine import queue as fifo
from ktk.machine import threads as engine
from ktk.ops.deferral import Deferred, sequence, split
from ktk.ops.inputs import as_call, on_stream
from ktk.ops.stream_moe import Pass
from ktk.ops.streamed import AnyMoE, StreamedMoE
from ktk.paths import user_path

_buffers = Buffers()
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_BIASES = ("gate_bias", "up_bias", "down_bias")
_MODE_AT = 14  # of the positional arguments


class _Submitted(NamedTuple):
    ticket: fifo.Ticket
    deferred: fifo.Ticket | None
    num_tokens: int
    device: str


class KTMoEWrapper(WeightWriter):
    """One MoE layer's CPU experts.

    Parameters
    ----------
    layer_idx : int
        Which layer's weights to load; also the order that deferral goes by.
    num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : int
        Shapes of the whole layer, whatever the thread pools.
    gpu_experts_mask : bool (num_experts,) tensor, array or list, or int, or None
        True = runs on the GPU, skipped here. Copied; update ``wrapper.gpu_experts_mask`` in place
        (or assign to it) and the next submit_forward sees it. An int n means the first n experts.
    cpuinfer_threads, threadpool_count, numa_nodes : int, int, sequence of int, or None
        Layout of the process-wide engine: threads in all, the parts they and each expert are split
        into, the NUMA node of each part. None takes what is there, at first every physical core and
        every node.
    weight_path : str, path or None
        A packed directory (``ktk convert``); an ordinary Hugging Face one, quantised at load; a
        GGUF file, one part of a split one, or their directory, run as it is mapped (method
        "LLAMAFILE" or "auto") or quantised anew.
    chunked_prefill_size : int
        Tokens that run at a time; more are run in chunks, with the same results.
    cpu_save : bool
        Also write what was quantised as a packed layer under ``weight_path``.
    max_deferred_experts_per_token : int or None
        See the module's text and ``select_deferred_experts``. None or 0: off.
    method : str
        One of ``ktk.backends.methods()``, or KT-Kernel's RAWINT4, GPTQ_INT4, MOE_INT4, MOE_INT8.
    mode : str
        "inference"; "sft" gives an ``SftWrapper`` instead, which has lora_rank and so on.
    num_gpu_experts : int or None
        The old form of the mask: the first n experts.
    swiglu_limit, swiglu_alpha : float
        limit > 0 clamps gate from above and up on both sides; alpha > 0 is the swigluoai
        activation, gate clamped on both sides too. Both 0: what the weights' own directory says,
        else SiLU.
    repack : bool or None
        ktk's own: as ``ktk.MoE`` takes it, for GGUF files.
    load_gpu_experts : bool
        ktk's own: False loads only the experts that the mask leaves to the CPU when weights are
        loaded; a call that routes to another, unmasked since, is a BackendError. Not with cpu_save,
        which writes whole layers.
    max_resident_experts : int or None
        ktk's own: so many of a packed layer or of a GGUF file are in memory, the others are read
        when a call needs them, with the same results. None: as KT_MAX_RESIDENT_EXPERTS says, whose
        policy KT_RESIDENCY_POLICY names; without it all are loaded.
    group_size, weight_format, activation_group, rotation : int, str, int, Rotation or int, or None
        ktk's own: see ``MoESpec``. None: as the method, then the packed file, then the default has
        it.

    Raises
    ------
    ValueError / TypeError naming the argument, EngineError for a thread layout that conflicts.

    With hidden states on a GPU and a ``cuda_stream``, all of a pass is put on that stream and
    nothing waits; it may be captured in a CUDA graph (``ktk.ops.stream_moe``). What fails there
    leaves NaN, and the next sync_forward of the wrapper raises it. Without a stream, or where the
    experts need Python, the copies to the CPU and back wait.

    ``forward`` may be called from several threads; submit_forward and sync_forward of one wrapper
    from one at a time.
    """

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: Any = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: Any = None,
        chunked_prefill_size: int = 4096,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str = "AMXINT4",
        numa_nodes: Sequence[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
        max_cache_depth: int | None = None,
        group_size: int | None = None,
        zero_point: bool | None = None,
        full_weight_grad: bool | None = None,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
        *,
        weight_format: str | None = None,
        activation_group: int | None = None,
        rotation: Rotation | int | None = None,
        repack: bool | None = None,
        load_gpu_experts: bool = True,
        max_resident_experts: int | None = None,
    ) -> None:
        super().__init__()
        given = lora_rank, lora_alpha, lora_dropout, max_cache_depth, zero_point, full_weight_grad
        check_mode(mode, given)
        self.layer_idx = checked_int("layer_idx", layer_idx, least=0)
        self.num_experts = checked_int("num_experts", num_experts)
        self.num_experts_per_tok = checked_int("num_experts_per_tok", num_experts_per_tok)
        self.hidden_size = checked_int("hidden_size", hidden_size)
        self.moe_intermediate_size = checked_int("moe_intermediate_size", moe_intermediate_size)
        check_top_k(self.num_experts_per_tok, self.num_experts)
        self.chunked_prefill_size = checked_int("chunked_prefill_size", chunked_prefill_size)
        deferred = max_deferred_experts_per_token
        self.max_deferred_experts_per_token = checked_int(
            "max_deferred_experts_per_token", 0 if deferred is None else deferred, least=0
        )
        self.method = backends.check_method(ktk_method(method))
        self.weight_path = None if weight_path is None else user_path(weight_path)
        self.cpu_save = bool(cpu_save)
        self._repack = repack
        self.load_gpu_experts = bool(load_gpu_experts)
        if self.cpu_save and not self.load_gpu_experts:
            raise ValueError("cpu_save=True writes whole layers: leave load_gpu_experts=True")
        self.weights = LayerWeights(
            layer_idx=self.layer_idx,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.moe_intermediate_size,
            method=self.method,
            weight_format=weight_format or backends.method_format(self.method),
            group_size=group_size,
            activation_group=activation_group,
            rotation=None if rotation is None else Rotation.of(rotation),
            activation=swiglu_activation(swiglu_limit, swiglu_alpha),
            weight_path=self.weight_path,
            cpu_save=self.cpu_save,
            residency=Residency.asked(max_resident_experts, self.num_experts_per_tok),
        )
        self.weights.check()
        self._mask = mask_of(gpu_experts_mask, num_gpu_experts, self.num_experts)
        self._moe: AnyMoE | None = None
        self._submitted: _Submitted | Pass | None = None
        sizes = Sizes(
            self.layer_idx,
            self.hidden_size,
            self.num_experts_per_tok,
            self.max_deferred_experts_per_token,
            self.chunked_prefill_size,
        )
        self._stream_side = StreamSide(sizes, self._mask)
        # Tasks nobody waits for; the next sync raises their exceptions.
        self._unseen: deque[fifo.Ticket] = deque()
        nodes = checked_nodes(numa_nodes, threadpool_count)
        layout = engine.acquire(self, cpuinfer_threads, threadpool_count, nodes)
        self.cpuinfer_threads = layout.num_threads
        self.threadpool_count = layout.threadpool_count
        self.numa_nodes = layout.numa_nodes

    @functools.wraps(__init__, assigned=(), updated=())  # type: ignore[misc]  # the signature
    def __new__(cls, *args: Any, **arguments: Any) -> Any:
        if arguments.get("mode", args[_MODE_AT] if len(args) > _MODE_AT else None) == "sft":
            from ktk.integration.kt_kernel.sft import sft_wrapper

            return sft_wrapper(cls, *args, **arguments)
        return super().__new__(cls)

    # -- what it holds -------------------------------------------------------------------------

    @property
    def gpu_experts_mask(self) -> Any:
        """The mask itself, a CPU bool tensor (num_experts,): change it in place,
        or assign a new value.
        """
        return self._mask

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: Any) -> None:
        self._mask.copy_(mask_of(mask, None, self.num_experts))

    @property
    def num_gpu_experts(self) -> int:
        """Experts the mask names."""
        return int(self._mask.sum())

    @property
    def moe(self) -> AnyMoE:
        """The operator. RuntimeError before the weights are loaded."""
        if self._moe is None:
            raise RuntimeError(
                f"layer {self.layer_idx} has no weights yet: call load_weights() or "
                "load_weights_from_tensors() first"
            )
        return self._moe

    def __repr__(self) -> str:
        state = "no weights" if self._moe is None else repr(self._moe)
        return f"KTMoEWrapper(layer {self.layer_idx}, {self.num_gpu_experts} GPU experts, {state})"

    # -- weights -------------------------------------------------------------------------------

    def load_weights(
        self, physical_to_logical_map: Any = None, *, physical_to_logical_map_cpu: Any = None
    ) -> None:
        """Load the layer from ``weight_path``: packed experts and GGUF blocks as they are, others
        quantised on the way.

        physical_to_logical_map : int64 (num_experts,), CPU, or None for the identity; slot p gets
            the weights of logical expert map[p]. (KT-Kernel's keyword with ``_cpu`` is the same
            argument.)
        Raises CheckpointError for a bad directory, ValueError if it holds another shape or format.
        """
        if physical_to_logical_map is None:
            physical_to_logical_map = physical_to_logical_map_cpu
        self.use(self.weights.load(physical_to_logical_map, self.cpuinfer_threads, self.kept()))

    def load_weights_from_tensors(
        self,
        gate_proj: Any,
        up_proj: Any,
        down_proj: Any,
        physical_to_logical_map_cpu: Any = None,
        gate_bias: Any = None,
        up_bias: Any = None,
        down_bias: Any = None,
    ) -> None:
        """Quantise and pack experts given as tensors or arrays; they are not kept.

        gate_proj, up_proj : float32, float16 or bfloat16 (num_experts, moe_intermediate_size,
            hidden_size);
        down_proj : (num_experts, hidden_size, moe_intermediate_size). Biases : (num_experts,
            out_features).
        physical_to_logical_map_cpu : checked, then taken as the identity, as KT-Kernel does here:
            row e of the tensors is expert e.
        Raises ValueError / TypeError naming the argument that does not fit.
        """
        values = (gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias)
        given = dict(zip((*_PROJECTIONS, *_BIASES), values, strict=True))
        packed = self.weights.from_tensors(
            given, physical_to_logical_map_cpu, self.cpuinfer_threads, self.kept()
        )
        self.use(packed)

    def kept(self) -> np.ndarray | None:
        """bool (num_experts,): slots to load; None: all."""
        if self.load_gpu_experts or not self._mask.any():
            return None
        kept: np.ndarray = ~self._mask.numpy()
        if not kept.any():
            kept[0] = True  # the shapes must come from somewhere
        return kept

    def use(self, experts: StoredExperts | StreamedMoE) -> None:
        """Run these from now on."""
        self._moe = self.weights.operator(experts, self.cpuinfer_threads, self._repack)

    # -- running -------------------------------------------------------------------------------

    def submit_forward(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, cuda_stream: Any = None
    ) -> None:
        """Queue one forward pass and return; its arguments may be overwritten at once.

        hidden_states : (..., hidden_size) float32, float16 or bfloat16; tensor on any device, or
            array.
        topk_ids : (num_tokens, num_experts_per_tok), any integer type; ids outside 0..num_experts-1
            and those of the mask add exactly zero. topk_weights : likewise, any float type.
        cuda_stream : CUDA stream handle the inputs were made on, or None / 0.
        A second submit before sync_forward replaces the first, as KT-Kernel overwrites its slot.
        Raises RuntimeError before the weights are loaded, TypeError / ValueError naming the
        argument.
        """
        if isinstance(self._submitted, _Submitted):
            self._unseen.extend(t for t in self._submitted[:2] if t is not None)
        self._submitted = None
        given = (hidden_states, topk_ids, topk_weights, cuda_stream)
        if cuda_stream and self._stream_side.takes(self.moe, hidden_states, cuda_stream):
            self._submitted = self._stream_side.submit(self.moe, *given)
            return
        self._submitted = self._enqueue(fifo.submit, *given)

    def sync_forward(self, hidden_states: Any, cuda_stream: Any = None) -> Any:
        """Wait for the last submit_forward; only deferred experts may still run afterwards.

        hidden_states : what was submitted, or another of its shape.
        Returns a new (num_tokens, hidden_size) tensor or array of the submitted kind, dtype and
        device.
        Raises RuntimeError without a submit_forward, else the first exception one of its tasks
        raised.
        """
        submitted = self._submitted
        if submitted is None:
            raise RuntimeError("sync_forward without submit_forward: nothing is under way")
        shape = tuple(getattr(hidden_states, "shape", ()))
        if shape[-1:] != (self.hidden_size,) or math.prod(shape[:-1]) != submitted.num_tokens:
            raise ValueError(
                f"sync_forward's hidden_states has shape {getattr(hidden_states, 'shape', None)}, "
                f"but {submitted.num_tokens} tokens of {self.hidden_size} were submitted"
            )
        self._submitted = None
        if isinstance(submitted, Pass):
            return self._stream_side.finish(submitted, cuda_stream, hidden_states.device)
        return self._finish(submitted, cuda_stream)

    def forward(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, cuda_stream: Any = None
    ) -> Any:
        """submit_forward and sync_forward in one, without a thread switch if the queue is empty.

        It leaves another submitted pass of this wrapper alone.
        """
        side, given = self._stream_side, (hidden_states, topk_ids, topk_weights, cuda_stream)
        if cuda_stream and side.takes(self.moe, hidden_states, cuda_stream):
            done = side.submit(self.moe, *given)
            return side.finish(done, cuda_stream, hidden_states.device)
        submitted = self._enqueue(fifo.run, *given)
        return self._finish(submitted, cuda_stream)

    __call__ = forward

    def _enqueue(
        self,
        start: Callable[[Callable[[], Any]], fifo.Ticket],
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        stream: Any,
    ) -> _Submitted:
        moe = self.moe
        before, sequence.deferred = sequence.deferred, None  # gone if anything below raises
        call = as_call(hidden_states, topk_ids, topk_weights, self.hidden_size, stream)
        ids, top_k = call.topk_ids, call.topk_ids.shape[1]
        if top_k != self.num_experts_per_tok:
            raise ValueError(
                f"topk_ids has {top_k} experts per token: the wrapper was made for "
                f"num_experts_per_tok={self.num_experts_per_tok}; fill unused slots with id -1"
            )
        here = (self.layer_idx, *call.hidden.shape)
        pending = before.ticket if before is not None and before.meant_for == here else None
        deferred_ids: np.ndarray | None = None
        if self.max_deferred_experts_per_token:
            protected = self.num_experts_per_tok - self.max_deferred_experts_per_token
            ids, deferred_ids = split(ids, call.topk_weights, protected)
            deferred_ids = deferred_ids if (deferred_ids != -1).any() else None
        key = (*call.hidden.shape, top_k, str(call.result.dtype), call.device)
        staging = _buffers.take(key, call.hidden, ids, call.topk_weights)
        result, out = call.result, call.out
        mask = self._mask.numpy()
        skip = mask.copy() if mask.any() else None

        def immediate_task() -> Any:
            try:
                add = None if pending is None else pending.take()
                own = staging.hidden, staging.ids, staging.weights
                self._run(moe, Operands(*own, skip, out, add))
                return result
            finally:
                if deferred_ids is None:
                    _buffers.give_back(staging)

        def deferred_task() -> Any:
            try:
                # float32 in, float32 out: it is rounded once, with the next layer's sum
                assert deferred_ids is not None
                floats = to_f32(staging.hidden)
                sums = np.empty_like(floats)
                self._run(moe, Operands(floats, deferred_ids, staging.weights, skip, sums))
                return sums
            finally:
                _buffers.give_back(staging)

        ticket, deferred = start(immediate_task), None
        if deferred_ids is not None:
            deferred = fifo.submit(deferred_task)
            sequence.deferred = Deferred((self.layer_idx + 1, *call.hidden.shape), deferred)
        return _Submitted(ticket, deferred, len(call.hidden), call.device)

    def _run(self, moe: AnyMoE, given: Operands) -> None:
        """moe.run, at most ``chunked_prefill_size`` tokens at a time."""
        num_tokens, most = len(given.hidden), self.chunked_prefill_size
        if num_tokens <= most:
            moe.run(given)
            return
        for start in range(0, num_tokens, most):
            moe.run(given.part(slice(start, start + most)))

    def _finish(self, submitted: _Submitted, stream: Any) -> Any:
        try:
            submitted.ticket.wait()
            self._raise_unseen()
            result = submitted.ticket.take()
        except BaseException:
            sequence.deferred = None  # this sequence ends here
            raise
        finally:
            if submitted.deferred is not None:  # only now: its errors belong to a later sync
                self._unseen.append(submitted.deferred)
        if submitted.device in ("cpu", "numpy"):
            return result
        with on_stream(submitted.device, stream):
            return result.to(submitted.device)

    def _raise_unseen(self) -> None:
        """The first exception of a task nobody waited for: replaced, or deferred and dropped."""
        for _ in range(len(self._unseen)):
            ticket = self._unseen.popleft()
            if not ticket.is_done:
                self._unseen.append(ticket)
            elif ticket.error is not None and not ticket.was_raised:
                ticket.take()

    select_deferred_experts = staticmethod(select_deferred_experts)

    # -- buffers -------------------------------------------------------------------------------

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Nothing to free: saved passes are their wrapper's."""

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Iterable[int]) -> None:
        """Batch sizes whose staging buffers are kept; all others share one."""
        _buffers.captured = tuple(checked_int("capture batch size", size) for size in capture_bs)
        stream_buffers.kept = _buffers.captured

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        return list(_buffers.captured)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Free the staging buffers not in use and drop this thread's pending deferred experts."""
        _buffers.clear()
        stream_buffers.clear()
        forget_deferred()
        sequence.deferred = None
