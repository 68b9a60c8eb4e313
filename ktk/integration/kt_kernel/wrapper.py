"""KTMoEWrapper: the KT-Kernel-compatible face of ``ktk.MoE``. Same arguments, same calls, checked.

What it adds to the operator: experts kept on a GPU (a mask, updated in place), submit_forward and
sync_forward around one process-wide worker, staging buffers, deferred experts, prefill in chunks.

Deferral: output(n) = immediate experts of layer n + deferred experts of layer n-1, added in float32
before the one rounding. A deferred result is used once, by the very next submit of the same thread,
if that is layer_idx + 1 with as many tokens of the same width; else it is dropped, as KT-Kernel drops
it when a dense layer lies between. So what an abandoned sequence left behind is never added to
another, and the last MoE layer should have max_deferred_experts_per_token=0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ktk import backends
from ktk.checkpoint import Checkpoint, is_gguf, list_layers, write_layer
from ktk.checkpoint.packed import layer_path, read_layer
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import GGUF
from ktk.experts.formats.floats import to_f32
from ktk.experts.spec import MoESpec
from ktk.experts.stored import BlockExperts, Packed
from ktk.integration.kt_kernel.arguments import check_mode, checked_int, mask_of, swiglu_activation
from ktk.integration.kt_kernel.staging import Buffers
from ktk.machine import queue as fifo
from ktk.machine import threads as engine
from ktk.machine.devices import (
    array_like,
    device_of,
    is_tensor,
    num_tokens_of,
    on_host,
    on_stream,
    tensor_like,
)
from ktk.machine.memory import aligned_buffer
from ktk.models import find_experts
from ktk.ops.gguf_model import open_experts
from ktk.ops.moe import MoE, as_hidden, as_routing, as_weights, expert_reader, is_bf16, to_numpy
from ktk.ops.requantise import packed_format
from ktk.paths import user_path
from ktk.quantise.pack import pack_experts

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_BIASES = ("gate_bias", "up_bias", "down_bias")


class KTMoEWrapper:
    """One MoE layer's CPU experts.

    Parameters
    ----------
    layer_idx : int
        Which layer's weights to load; also the order that deferral goes by.
    num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : int
        Shapes of the whole layer, whatever the thread pools.
    gpu_experts_mask : bool (num_experts,) tensor, array or list, or int, or None
        True = runs on the GPU, skipped here. Copied; update ``wrapper.gpu_experts_mask`` in place (or
        assign to it) and the next submit_forward sees it. An int n means the first n experts.
    cpuinfer_threads, threadpool_count, numa_nodes : int, int, sequence of int, or None
        Layout of the process-wide engine: threads in all, the parts they and each expert are split into, the NUMA
        node of each part. None takes what is there, at first every physical core and every node.
    weight_path : str, path or None
        A packed directory (``ktk convert``); an ordinary Hugging Face one, quantised at load; a GGUF file, one part
        of a split one, or their directory, run as it is mapped (method "LLAMAFILE" or "auto") or quantised anew.
    chunked_prefill_size : int
        Tokens that run at a time; more are run in chunks, with the same results.
    cpu_save : bool
        Also write what was quantised as a packed layer under ``weight_path``.
    max_deferred_experts_per_token : int or None
        See the module's text and ``select_deferred_experts``. None or 0: off.
    method : str
        One of ``ktk.backends.methods()``.
    mode : str
        "inference". "sft" and its arguments (lora_rank ... full_weight_grad) are refused in this version.
    num_gpu_experts : int or None
        The old form of the mask: the first n experts.
    swiglu_limit, swiglu_alpha : float
        limit > 0 clamps gate from above and up on both sides; alpha > 0 is the swigluoai activation,
        gate clamped on both sides too. Both 0: what the weights' own directory says, else SiLU.
    repack : bool or None
        ktk's own: as ``ktk.MoE`` takes it, for GGUF files.
    group_size, weight_format, activation_group : int, str, int or None
        ktk's own: see ``MoESpec``. None: as the method, then the packed file, then the default has it.

    Raises
    ------
    ValueError / TypeError naming the argument, EngineError for a thread layout that conflicts.

    Hidden states on a GPU are copied to the CPU and back on ``cuda_stream``; the copies wait, so submit_forward
    then returns after the first of them.

    ``forward`` may be called from several threads; submit_forward and sync_forward of one wrapper from
    one at a time.
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
        repack: bool | None = None,
    ) -> None:
        sft_only = {
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "max_cache_depth": max_cache_depth,
            "zero_point": zero_point,
            "full_weight_grad": full_weight_grad,
        }
        check_mode(mode, [name for name, value in sft_only.items() if value is not None])
        self.layer_idx = checked_int("layer_idx", layer_idx, least=0)
        self.num_experts = checked_int("num_experts", num_experts)
        self.num_experts_per_tok = checked_int("num_experts_per_tok", num_experts_per_tok)
        self.hidden_size = checked_int("hidden_size", hidden_size)
        self.moe_intermediate_size = checked_int("moe_intermediate_size", moe_intermediate_size)
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={num_experts_per_tok}: must be at most num_experts={num_experts}"
            )
        self.chunked_prefill_size = checked_int("chunked_prefill_size", chunked_prefill_size)
        deferred = max_deferred_experts_per_token
        self.max_deferred_experts_per_token = checked_int(
            "max_deferred_experts_per_token", 0 if deferred is None else deferred, least=0
        )
        self.method = backends.check_method(method)
        self.weight_path = None if weight_path is None else user_path(weight_path)
        self.cpu_save = bool(cpu_save)
        self._activation = swiglu_activation(swiglu_limit, swiglu_alpha)
        self._weight_format = weight_format or backends.method_format(self.method)
        self._group_size = group_size
        self._activation_group = activation_group
        self._repack = repack
        if self._weight_format is not None:
            backends.select(self.method, self._spec())  # refuse now rather than after the long part
        self._mask = mask_of(gpu_experts_mask, num_gpu_experts, self.num_experts)
        self._moe: MoE | None = None
        self._submitted: _Submitted | None = None
        # Tasks nobody waits for; the next sync raises their exceptions.
        self._unseen: deque[fifo.Ticket] = deque()
        nodes = (
            None
            if numa_nodes is None
            else tuple(checked_int("numa_nodes", n, 0) for n in numa_nodes)
        )
        if nodes is not None and threadpool_count is not None and len(nodes) != threadpool_count:
            raise ValueError(
                f"numa_nodes={list(nodes)} has {len(nodes)} entries: "
                f"must be one per thread pool, threadpool_count={threadpool_count}"
            )
        layout = engine.acquire(self, cpuinfer_threads, threadpool_count, nodes)
        self.cpuinfer_threads = layout.num_threads
        self.threadpool_count = layout.threadpool_count
        self.numa_nodes = layout.numa_nodes

    # -- what it holds -------------------------------------------------------------------------

    @property
    def gpu_experts_mask(self) -> Any:
        """The mask itself, a CPU bool tensor (num_experts,): change it in place, or assign a new value."""
        return self._mask

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: Any) -> None:
        self._mask.copy_(mask_of(mask, None, self.num_experts))

    @property
    def num_gpu_experts(self) -> int:
        """Experts the mask names."""
        return int(self._mask.sum())

    @property
    def moe(self) -> MoE:
        """The operator. RuntimeError before the weights are loaded."""
        if self._moe is None:
            raise RuntimeError(
                f"layer {self.layer_idx} has no weights yet: call load_weights() or load_weights_from_tensors() first"
            )
        return self._moe

    def __repr__(self) -> str:
        state = "no weights" if self._moe is None else repr(self._moe)
        return f"KTMoEWrapper(layer {self.layer_idx}, {self.num_gpu_experts} GPU experts, {state})"

    # -- weights -------------------------------------------------------------------------------

    def load_weights(
        self, physical_to_logical_map: Any = None, *, physical_to_logical_map_cpu: Any = None
    ) -> None:
        """Load the layer from ``weight_path``: packed experts and GGUF blocks as they are, others quantised on the way.

        physical_to_logical_map : int64 (num_experts,), CPU, or None for the identity; slot p gets the
            weights of logical expert map[p]. (KT-Kernel's keyword with ``_cpu`` is the same argument.)
        Raises CheckpointError for a bad directory, ValueError if it holds another shape or format.
        """
        if physical_to_logical_map is None:
            physical_to_logical_map = physical_to_logical_map_cpu
        order = self._order(physical_to_logical_map)
        path = self.weight_path
        if path is None:
            raise ValueError(
                "weight_path is None: name a directory at construction, or call load_weights_from_tensors()"
            )
        if is_gguf(path):
            self._use(self._from_gguf(path, order))
            return
        if layer_path(path, self.layer_idx).exists():
            packed = read_layer(path, self.layer_idx)
            packed = Packed(self._check_packed(packed.spec, path), packed.data)
        else:
            packed = self._quantise_checkpoint(path)
        self._use(_reorder(packed, order))

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

        gate_proj, up_proj : float32, float16 or bfloat16 (num_experts, moe_intermediate_size, hidden_size);
        down_proj : (num_experts, hidden_size, moe_intermediate_size). Biases : (num_experts, out_features).
        physical_to_logical_map_cpu : checked, then taken as the identity, as KT-Kernel does here: row e of
            the tensors is expert e.
        Raises ValueError / TypeError naming the argument that does not fit.
        """
        self._order(physical_to_logical_map_cpu)
        given = dict(
            zip(
                (*_PROJECTIONS, *_BIASES),
                (gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias),
                strict=True,
            )
        )
        biases = [name for name in _BIASES if given[name] is not None]
        if biases and len(biases) < 3:
            raise ValueError(f"only {', '.join(biases)} given: give all three biases or none")
        e, i, h = self.num_experts, self.moe_intermediate_size, self.hidden_size
        shapes = ((e, i, h), (e, i, h), (e, h, i), (e, i), (e, i), (e, h))
        for (name, x), shape in zip(given.items(), shapes, strict=True):
            if x is None and name in _BIASES:
                continue
            array = to_numpy(x, name)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {tuple(array.shape)}: must be {shape}")
            as_weights(x[:0], name)  # dtype

        spec = self._spec(has_bias=bool(biases))
        backends.select(self.method, spec)
        packed = pack_experts(spec, expert_reader(given), self.cpuinfer_threads)
        self._save(packed)
        self._use(packed)

    def _spec(self, **fields: Any) -> MoESpec:
        """The spec the constructor asked for; ``fields`` come from the weights."""
        fields = {"activation": self._activation or Activation(), **fields}
        return MoESpec(
            self.num_experts,
            self.hidden_size,
            self.moe_intermediate_size,
            self._weight_format or "int4",
            self._group_size,
            self._activation_group,
            **fields,
        )

    def _order(self, physical_to_logical_map: Any) -> np.ndarray | None:
        """The checked map, int64 (num_experts,); None if it is the identity."""
        if physical_to_logical_map is None:
            return None
        order = to_numpy(physical_to_logical_map, "physical_to_logical_map")
        if order.dtype != np.int64 or is_bf16(physical_to_logical_map):
            raise TypeError(f"physical_to_logical_map has dtype {order.dtype}: must be int64")
        if order.shape != (self.num_experts,):
            raise ValueError(
                f"physical_to_logical_map has shape {tuple(order.shape)}: must be ({self.num_experts},)"
            )
        if order.min() < 0 or order.max() >= self.num_experts:
            raise ValueError(
                f"physical_to_logical_map goes from {order.min()} to {order.max()}: "
                f"must stay in 0..{self.num_experts - 1}"
            )
        return None if np.array_equal(order, np.arange(self.num_experts)) else order

    def _check_shapes(self, fields: dict[str, Any], source: str) -> None:
        for name, own in (
            ("num_experts", self.num_experts),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.moe_intermediate_size),
        ):
            if fields[name] != own:
                raise ValueError(
                    f"{source} has {name}={fields[name]}, the wrapper was made for {own}"
                )

    def _check_packed(self, spec: MoESpec, path: Path) -> MoESpec:
        """The file's spec with this wrapper's activation_group; ValueError if they do not fit."""
        source = f"{path}, layer {self.layer_idx},"
        self._check_shapes(dataclasses.asdict(spec), source)
        if self._weight_format not in (None, spec.weight_format):
            raise ValueError(
                f"{source} holds {spec.weight_format} weights, the wrapper (method={self.method!r}) "
                f"asks for {self._weight_format}: use method='auto', or convert again"
            )
        if self._group_size not in (None, spec.group_size):
            raise ValueError(
                f"{source} has group_size={spec.group_size}, the wrapper asks for {self._group_size}"
            )
        group = self._activation_group
        return dataclasses.replace(
            spec,
            activation=self._agreed_activation(spec.activation, source),
            activation_group=spec.activation_group if group is None else group,
        )

    def _agreed_activation(self, recorded: Activation, source: str) -> Activation:
        """What to run where weights record one activation and swiglu_limit / swiglu_alpha ask for another.

        Plain SiLU is what a checkpoint records that says nothing: the arguments win. A recorded swigluoai with the
        same limit and alpha wins over KT-Kernel's form of it, which clamps the gate from below too.
        """
        asked = self._activation
        if asked is None or dataclasses.replace(asked, gate_min=-math.inf) == recorded:
            return recorded
        if asked != recorded and recorded != Activation():
            raise ValueError(
                f"{source} records {recorded}, swiglu_limit and swiglu_alpha ask for {asked}: "
                f"leave them 0 to take what is recorded"
            )
        return asked

    def _from_gguf(self, path: Path, order: np.ndarray | None) -> Packed | BlockExperts:
        """The layer of a GGUF file, with this wrapper's activation: its blocks, or packed as the wrapper asks."""
        blocks = open_experts(path).experts(self.layer_idx)
        source = f"{path}, layer {self.layer_idx},"
        self._check_shapes(dataclasses.asdict(blocks.spec), source)
        activation = self._agreed_activation(blocks.spec.activation, source)
        spec = dataclasses.replace(blocks.spec, activation=activation)
        blocks = dataclasses.replace(blocks, spec=spec, order=order)
        weight_format = self._weight_format or packed_format(self.method, blocks) or GGUF.name
        activation_group = self._activation_group
        if activation_group is None and weight_format == GGUF.name:
            activation_group = spec.activation_group  # of the layer's types
        spec = dataclasses.replace(
            spec,
            weight_format=weight_format,
            group_size=self._group_size,
            activation_group=activation_group,
        )
        if weight_format == GGUF.name:
            return dataclasses.replace(blocks, spec=spec)
        backends.select(self.method, spec)  # refuse before the long part
        return pack_experts(spec, partial(expert_weights, blocks), self.cpuinfer_threads)

    def _quantise_checkpoint(self, path: Path) -> Packed:
        """The layer of an ordinary directory, in logical order; written beside it with cpu_save."""
        layer = self.layer_idx
        with contextlib.ExitStack() as stack:
            try:
                experts = find_experts(stack.enter_context(Checkpoint.open(path)))
                if layer not in experts.layers:
                    raise CheckpointError(
                        f"{path}: no experts in layer {layer}, but in {experts.layers}"
                    )
            except CheckpointError as error:
                if not path.is_dir() or not list_layers(path):
                    raise
                raise CheckpointError(
                    f"{path}: its packed layers are {list_layers(path)}, layer {layer} is not among them; "
                    f"nor can it be quantised: {error}"
                ) from error
            fields = experts.spec_fields(layer)
            self._check_shapes(fields, f"{path}, layer {layer},")
            spec = self._spec(
                has_gate=fields["has_gate"],
                has_bias=fields["has_bias"],
                activation=self._agreed_activation(fields["activation"], str(path)),
            )
            backends.select(self.method, spec)
            packed = pack_experts(spec, partial(experts.read_stored, layer), self.cpuinfer_threads)
        self._save(packed)
        return packed

    def _save(self, packed: Packed) -> None:
        if self.cpu_save and self.weight_path is not None:
            self.weight_path.mkdir(parents=True, exist_ok=True)
            write_layer(self.weight_path, packed.spec, self.layer_idx, packed.data)

    def _use(self, experts: Packed | BlockExperts) -> None:
        repack = self._repack if isinstance(experts, BlockExperts) else None
        self._moe = MoE(
            experts, method=self.method, num_threads=self.cpuinfer_threads, repack=repack
        )

    # -- running -------------------------------------------------------------------------------

    def submit_forward(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, cuda_stream: Any = None
    ) -> None:
        """Queue one forward pass and return; its arguments may be overwritten at once.

        hidden_states : (..., hidden_size) float32, float16 or bfloat16; tensor on any device, or array.
        topk_ids : (num_tokens, num_experts_per_tok), any integer type; ids outside 0..num_experts-1 and those
            of the mask add exactly zero. topk_weights : likewise, any float type.
        cuda_stream : CUDA stream handle the inputs were made on, or None / 0.
        A second submit before sync_forward replaces the first, as KT-Kernel overwrites its slot.
        Raises RuntimeError before the weights are loaded, TypeError / ValueError naming the argument.
        """
        if self._submitted is not None:
            self._unseen.extend(t for t in self._submitted[:2] if t is not None)
        self._submitted = None
        self._submitted = self._enqueue(
            fifo.submit, hidden_states, topk_ids, topk_weights, cuda_stream
        )

    def sync_forward(self, hidden_states: Any, cuda_stream: Any = None) -> Any:
        """Wait for the last submit_forward; only deferred experts may still run afterwards.

        hidden_states : what was submitted, or another of its shape.
        Returns a new (num_tokens, hidden_size) tensor or array of the submitted kind, dtype and device.
        Raises RuntimeError without a submit_forward, else the first exception one of its tasks raised.
        """
        submitted = self._submitted
        if submitted is None:
            raise RuntimeError("sync_forward without submit_forward: nothing is under way")
        if num_tokens_of(hidden_states, self.hidden_size) != submitted.num_tokens:
            raise ValueError(
                f"sync_forward's hidden_states has shape {getattr(hidden_states, 'shape', None)}, "
                f"but {submitted.num_tokens} tokens of {self.hidden_size} were submitted"
            )
        self._submitted = None
        return self._finish(submitted, cuda_stream)

    def forward(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any, cuda_stream: Any = None
    ) -> Any:
        """submit_forward and sync_forward in one, without a thread switch if the queue is empty.

        It leaves another submitted pass of this wrapper alone.
        """
        submitted = self._enqueue(fifo.run, hidden_states, topk_ids, topk_weights, cuda_stream)
        return self._finish(submitted, cuda_stream)

    __call__ = forward

    def _inputs(
        self, hidden_states: Any, topk_ids: Any, topk_weights: Any
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Checked and on the host: hidden of the caller's kind, its bits, int64 ids, float32 weights."""
        hidden = on_host(hidden_states)
        if num_tokens_of(hidden, self.hidden_size) is not None:
            hidden = hidden.reshape(-1, self.hidden_size)  # (num_tokens, hidden_size)
        bits = as_hidden(hidden, self.hidden_size)
        ids, weights = as_routing(on_host(topk_ids), on_host(topk_weights), len(bits))
        if ids.shape[1] != self.num_experts_per_tok:
            raise ValueError(
                f"topk_ids has {ids.shape[1]} experts per token: the wrapper was made for "
                f"num_experts_per_tok={self.num_experts_per_tok}; fill unused slots with id -1"
            )
        return hidden, bits, ids, weights

    def _enqueue(
        self,
        start: Callable[[Callable[[], Any]], fifo.Ticket],
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        stream: Any,
    ) -> _Submitted:
        moe = self.moe
        before, _sequence.deferred = _sequence.deferred, None  # gone if anything below raises
        device = device_of(hidden_states)
        with on_stream(device, stream):
            hidden, bits, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights)
        here = (self.layer_idx, *bits.shape)
        pending = before.ticket if before is not None and before.meant_for == here else None
        deferred_ids: np.ndarray | None = None
        if self.max_deferred_experts_per_token:
            protected = self.num_experts_per_tok - self.max_deferred_experts_per_token
            ids, deferred_ids = _split(ids, weights, protected)
            deferred_ids = deferred_ids if (deferred_ids != -1).any() else None
        key = (*bits.shape, ids.shape[1], str(hidden.dtype), device)
        staging = _buffers.take(key, bits, ids, weights)
        mask = self._mask.numpy()
        run = partial(
            _run, moe, self.chunked_prefill_size, skip=mask.copy() if mask.any() else None
        )
        dtype = hidden.dtype
        like = tensor_like if is_tensor(hidden) else array_like

        def immediate_task() -> Any:
            try:
                add = None if pending is None else pending.take()
                return run(like(staging.hidden, dtype), staging.ids, staging.weights, add=add)
            finally:
                if deferred_ids is None:
                    _buffers.give_back(staging)

        def deferred_task() -> Any:
            try:
                # float32 in, float32 out: it is rounded once, with the next layer's sum
                assert deferred_ids is not None
                return run(to_f32(staging.hidden), deferred_ids, staging.weights)
            finally:
                _buffers.give_back(staging)

        ticket, deferred = start(immediate_task), None
        if deferred_ids is not None:
            deferred = fifo.submit(deferred_task)
            _sequence.deferred = _Deferred((self.layer_idx + 1, *bits.shape), deferred)
        return _Submitted(ticket, deferred, len(bits), device)

    def _finish(self, submitted: _Submitted, stream: Any) -> Any:
        try:
            submitted.ticket.wait()
            self._raise_unseen()
            result = submitted.ticket.take()
        except BaseException:
            _sequence.deferred = None  # this sequence ends here
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

    @staticmethod
    def select_deferred_experts(expert_ids: Any, scores: Any, protected_k: int) -> tuple[Any, Any]:
        """Split each token's experts into those to run now and those to run with the next layer.

        expert_ids : any integer type (num_tokens, top_k); scores : any float type, likewise.
        The protected_k best scores of every token are collected over the whole batch: an expert that one
        token protects runs now for all of them. So a token defers at most top_k - protected_k experts, often
        fewer in a bigger batch. The GPU mask is not looked at; an id of -1 stays -1 in both.
        Returns (immediate_ids, deferred_ids), int64 (num_tokens, top_k), -1 where the other has the expert.
        """
        device = device_of(expert_ids)
        host = on_host(expert_ids)
        rows = host.shape[0] if getattr(host, "ndim", 0) else 0
        ids, weights = as_routing(host, on_host(scores), rows)
        pair = _split(ids, weights, protected_k)
        if device == "numpy":
            return pair
        torch = sys.modules["torch"]
        return torch.from_numpy(pair[0]).to(device), torch.from_numpy(pair[1]).to(device)

    # -- buffers -------------------------------------------------------------------------------

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Nothing to free: this version has no fine-tuning buffers."""

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Iterable[int]) -> None:
        """Batch sizes whose staging buffers are kept; all others share one."""
        _buffers.captured = tuple(checked_int("capture batch size", size) for size in capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        return list(_buffers.captured)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Free the staging buffers not in use and drop this thread's pending deferred experts."""
        _buffers.clear()
        _sequence.deferred = None


# -- weights ---------------------------------------------------------------------------------------


def _reorder(packed: Packed, order: np.ndarray | None) -> Packed:
    """Slot p gets span order[p]: the data itself is moved, and copied only if a span is needed twice."""
    if order is None:
        return packed
    data = packed.data
    if len(np.unique(order)) < len(order):
        copy = aligned_buffer(data.size).reshape(data.shape)
        for slot, source in enumerate(order):
            copy[slot] = data[source]
        return Packed(packed.spec, copy)
    moved = order == np.arange(len(order))
    for start in np.nonzero(~moved)[0].tolist():
        if moved[start]:
            continue
        first, slot = data[start].copy(), start  # follow the cycle that begins here
        while order[slot] != start:
            data[slot] = data[order[slot]]
            moved[slot] = True
            slot = int(order[slot])
        data[slot] = first
        moved[slot] = True
    return Packed(packed.spec, data)


# -- running ---------------------------------------------------------------------------------------


class _Submitted(NamedTuple):
    ticket: fifo.Ticket
    deferred: fifo.Ticket | None
    num_tokens: int
    device: str


class _Deferred(NamedTuple):
    meant_for: tuple[int, int, int]  # layer_idx, tokens, hidden_size
    ticket: fifo.Ticket


class _Sequence(threading.local):
    """Deferred experts of the calling thread's last submit: a thread is a sequence of layers."""

    deferred: _Deferred | None = None


_sequence = _Sequence()


_buffers = Buffers()


def _renew() -> None:
    """In a forked child: the lock may be held by a thread that is not there, deferred work never ends."""
    global _buffers
    captured, _buffers = _buffers.captured, Buffers()
    _buffers.captured = captured
    _sequence.deferred = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _split(ids: np.ndarray, scores: np.ndarray, protected_k: int) -> tuple[np.ndarray, np.ndarray]:
    """See ``KTMoEWrapper.select_deferred_experts``; equal scores protect the earlier slot."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, : max(protected_k, 0)]
    now = np.isin(ids, np.take_along_axis(ids, best, axis=1))  # (num_tokens, top_k)
    return np.where(now, ids, -1), np.where(now, -1, ids)


def _run(
    moe: MoE,
    chunk: int,
    hidden: Any,
    ids: np.ndarray,
    weights: np.ndarray,
    *,
    skip: np.ndarray | None,
    add: np.ndarray | None = None,
) -> Any:
    """moe.forward, at most ``chunk`` tokens at a time."""
    if len(hidden) <= chunk:
        return moe.forward(hidden, ids, weights, skip=skip, add=add)
    out = None
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        more = None if add is None else add[rows]
        part = moe.forward(hidden[rows], ids[rows], weights[rows], skip=skip, add=more)
        if out is None:
            shape = (len(hidden), moe.spec.hidden_size)
            out = part.new_empty(shape) if is_tensor(part) else np.empty(shape, part.dtype)
        out[rows] = part
    return out
