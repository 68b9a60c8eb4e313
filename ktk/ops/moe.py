"""MoE: the operator. (hidden_states, topk_ids, topk_weights) -> output,
NumPy arrays or CPU torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ktk import backends
from ktk.backends import Operands
from ktk.checkpoint.packed import read_layer
from ktk.errors import BackendError
from ktk.experts.activation import Activation
from ktk.experts.formats.floats import to_f32
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.machine import threads as engine
from ktk.ops.inputs import (
    as_add,
    as_hidden,
    as_mask,
    as_routing,
    as_weights,
    new_like,
    plain,
    to_numpy,
)
from ktk.ops.requantise import plan
from ktk.placement.store import ExpertStore
from ktk.quantise.pack import pack_experts


def expert_reader(arrays: dict[str, Any]) -> Callable[[int], ExpertWeights]:
    """Reader of experts stacked along dimension 0; converts one at a time.

    arrays : gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias in this order, checked;
        None where absent.
    """

    def part(name: str, expert: int) -> np.ndarray | None:
        if arrays[name] is None:
            return None
        row = as_weights(arrays[name][expert], name)
        return to_f32(row) if name.endswith("bias") else np.ascontiguousarray(row)

    def read(expert: int) -> ExpertWeights:
        return ExpertWeights(*(part(name, expert) for name in arrays))  # type: ignore[arg-type]

    return read


class MoE:
    """One layer's experts, ready to run.

    Parameters
    ----------
    packed : StoredExperts or ktk.placement.store.ExpertStore
        The experts. Shared, not copied; but GGUF blocks with a method for packed weights are
        quantised anew.
    method : str
        "auto", a backend ("AVX512", "AMXINT4", ...) or a format ("INT8", ...): see
        ``ktk.backends.report()``.
    num_threads : int or None
        Threads of the process-wide engine; None takes the engine's, at first KTK_NUM_THREADS or the
        physical cores.
    repack : bool or None
        Copy GGUF blocks into memory in the order the kernels read them; None: KTK_REPACK, default
        no.

    Raises
    ------
    BackendError if nothing can run it, EngineError if the engine already runs with another thread
    count.
    """

    is_streamed = False  # all experts stay in memory

    def __init__(
        self,
        packed: StoredExperts | ExpertStore,
        *,
        method: str = "auto",
        num_threads: int | None = None,
        repack: bool | None = None,
    ) -> None:
        store = packed if isinstance(packed, ExpertStore) else None
        stored = packed.experts if isinstance(packed, ExpertStore) else packed
        spec, make = plan(stored, method, repack if store is None else False)
        # Refuse before the long part; so does the engine.
        backend = backends.select(method, spec)
        if store is not None and (repack or spec != store.spec or not backend.takes_stores):
            raise BackendError(
                f"{backend.name} with method={method!r}, repack={repack}: experts of an "
                "ExpertStore run as they lie, by compiled kernels; use method='auto' and leave "
                "repack out"
            )
        layout = engine.acquire(self, num_threads)
        stored = make(layout.num_threads)
        self.spec = spec
        self.backend = backend.name
        self.kernel = backend.kernel(spec)
        if not stored.is_packed:
            self.kernel += f" {stored.types}"
        self.bits_per_weight = stored.bits_per_weight
        self.num_threads = layout.num_threads
        self.runner = backend.load(store or stored, layout)

    @classmethod
    def from_weights(
        cls,
        gate_proj: Any,
        up_proj: Any,
        down_proj: Any,
        *,
        gate_bias: Any = None,
        up_bias: Any = None,
        down_bias: Any = None,
        activation: Activation | None = None,
        weight_format: str | None = None,
        group_size: int | None = None,
        activation_group: int | None = None,
        rotation: Rotation | int | None = None,
        method: str = "auto",
        num_threads: int | None = None,
    ) -> MoE:
        """Quantise and pack float experts.

        gate_proj, up_proj : (num_experts, intermediate_size, hidden_size); gate_proj None without a
            gate.
        down_proj : (num_experts, hidden_size, intermediate_size). float32, float16 or bfloat16.
        Biases : (num_experts, out_features) or None. weight_format defaults to the method's, else
        "int4". group_size, activation_group, rotation : as in MoESpec.
        Raises ValueError / TypeError naming the argument that does not fit.
        """
        arrays = {
            "gate_proj": gate_proj,
            "up_proj": up_proj,
            "down_proj": down_proj,
            "gate_bias": gate_bias,
            "up_bias": up_bias,
            "down_bias": down_bias,
        }
        given = {name: to_numpy(x, name) for name, x in arrays.items() if x is not None}
        for name in ("up_proj", "down_proj"):
            if name not in given:
                raise ValueError(f"{name} is None: only gate_proj and the biases may be")
        for name, array in given.items():
            as_weights(arrays[name][:0], name)  # dtype
            want = 3 if name.endswith("proj") else 2
            if array.ndim != want:
                raise ValueError(
                    f"{name} has shape {array.shape}: must have {want} dimensions, num_experts "
                    "first"
                )
        for name, array in given.items():
            if array.shape[0] != given["up_proj"].shape[0]:
                raise ValueError(
                    f"{name} has {array.shape[0]} experts, up_proj has {given['up_proj'].shape[0]}"
                )
            if not array.size:
                raise ValueError(f"{name} has shape {array.shape}: no dimension may be 0")
        num_experts, intermediate_size, hidden_size = given["up_proj"].shape
        spec = MoESpec(
            num_experts,
            hidden_size,
            intermediate_size,
            weight_format or backends.method_format(method) or "int4",
            group_size,
            activation_group,
            has_gate=gate_proj is not None,
            has_bias=any(name.endswith("bias") for name in given),
            activation=activation or Activation(),
            rotation=rotation,
        )
        backends.select(method, spec)  # refuse before the long part, and so does the engine
        holder = engine.Holder()
        num_threads = engine.acquire(holder, num_threads).num_threads

        return cls(
            pack_experts(spec, expert_reader(arrays), num_threads),
            method=method,
            num_threads=num_threads,
        )

    @classmethod
    def load(
        cls, path: Any, layer: int, *, method: str = "auto", num_threads: int | None = None
    ) -> MoE:
        """One layer of a packed directory (``ktk convert``). Raises CheckpointError."""
        return cls(read_layer(path, layer), method=method, num_threads=num_threads)

    def forward(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        skip: Any = None,
        add: Any = None,
    ) -> Any:
        """Sum over each token's slots of weight * expert(hidden).

        hidden_states : (num_tokens, hidden_size), float32, float16 or bfloat16; zero tokens are
            fine.
        topk_ids : (num_tokens, top_k), any integer type; an id outside 0..num_experts-1 or with
            ``skip`` set adds exactly zero; an expert named twice adds twice.
        topk_weights : (num_tokens, top_k), any float type, used as float32.
        skip : bool (num_experts,) or None; experts that run elsewhere.
        add : float32 (num_tokens, hidden_size) or None, added last.
        Returns a new array or tensor like hidden_states. NaN and inf stay in their own row, as NaN
        or inf.
        Raises TypeError / ValueError naming the argument that does not fit.
        """
        hidden = as_hidden(hidden_states, self.spec.hidden_size)
        ids, weights = as_routing(topk_ids, topk_weights, len(hidden))
        mask = as_mask(skip, self.spec.num_experts)
        result, out = new_like(hidden_states, hidden.shape)
        self.run(Operands(hidden, ids, weights, mask, out, as_add(add, hidden.shape)))
        return result

    __call__ = forward

    def run(self, given: Operands) -> None:
        """``forward`` of what ``ktk.ops.inputs`` has checked, into ``out``, like ``hidden``."""
        if len(given.hidden):
            self.runner.forward(given)

    def linear(self, projection: str, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        """One projection without its bias: the way out for activations ktk does not know.

        projection : "gate_up" (columns gate, then up) or "down". x : float32 (rows, in_features).
        expert_ids : int (rows,), each in 0..num_experts-1. Returns float32 (rows, out_features).
        """
        if projection not in ("gate_up", "down"):
            raise ValueError(f"projection={projection!r}: must be 'gate_up' or 'down'")
        width = self.spec.intermediate_size if projection == "down" else self.spec.hidden_size
        x = to_numpy(x, "x")
        ids = to_numpy(expert_ids, "expert_ids")
        if x.dtype != np.float32 or ids.dtype.kind not in "iu":
            raise TypeError(
                f"x is {x.dtype}, expert_ids {ids.dtype}: must be float32 and an integer type"
            )
        x, ids = plain(x), plain(ids.astype(np.int64, copy=False))
        if x.ndim != 2 or x.shape[1] != width or ids.shape != (len(x),):
            raise ValueError(
                f"x {x.shape}, expert_ids {ids.shape}: must be (rows, {width}) and (rows,)"
            )
        if len(ids) and (ids.min() < 0 or ids.max() >= self.spec.num_experts):
            raise ValueError(
                f"expert_ids go from {ids.min()} to {ids.max()}: must be "
                f"0..{self.spec.num_experts - 1}"
            )
        return self.runner.linear(projection, x, ids)

    @property
    def packed(self) -> Any:
        """The experts, ``StoredExperts``; on a machine of several NUMA nodes a copy,
        put together from its parts.
        """
        return self.runner.packed()

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"MoE({s.num_experts} experts, {s.hidden_size} x {s.intermediate_size}, "
            f"{self.backend}: {self.kernel}, {self.bits_per_weight:.2f} bits per weight, "
            f"{self.num_threads} threads)"
        )
