"""``DecoderLayer``: one new token through a whole decoder layer in one native call (``_cy/kernels/decoder.c``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ktk._cy import native_module
from ktk.errors import BackendError
from ktk.experts.activation import Activation
from ktk.machine import cpu
from ktk.machine import threads as engine
from ktk.machine.openmp import borrow
from ktk.ops.linear import Linear
from ktk.ops.linear import why_not as linear_why_not
from ktk.ops.moe import MoE
from ktk.ops.router import Router

HEAD_STEP = 16  # head_dim is a multiple of it


@dataclass(frozen=True, eq=False)
class Mlp:
    """Dense or shared experts: down(act(gate(x)) * up(x)), times sigmoid(x . scale) if there is a scale, float32 (hidden_size,)."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Activation
    scale: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """A decoder layer: RMSNorm, attention over cached keys, RMSNorm, experts and an MLP, residuals added.

    q, k, v, o : projections. input_norm, output_norm : float32 (hidden_size,), before attention and before the experts. q_norm,
    k_norm : float32 (head_dim,), or (heads * head_dim,) where the norm goes over all heads, or None; the first rotary_dim of
    each head are then rotated, pairs half of rotary_dim apart or, is_interleaved, next to each other. scaling : of
    scores. sinks : float32 (num_heads,), a score without a value, or None. experts with logits (hidden_size ->
    num_experts) and router, or None; mlp or None, but not neither. Raises ValueError if shapes do not fit.
    """

    head_dim: int
    rotary_dim: int
    scaling: float
    epsilon: float
    input_norm: np.ndarray
    output_norm: np.ndarray
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    is_interleaved: bool = False
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None
    head_epsilon: float = 0.0
    sinks: np.ndarray | None = None
    experts: MoE | None = None
    logits: Linear | None = None
    router: Router | None = None
    mlp: Mlp | None = None

    @property
    def hidden_size(self) -> int:
        return self.q.in_features

    @property
    def num_heads(self) -> int:
        return self.q.out_features // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.k.out_features // self.head_dim

    @property
    def norm_is_whole(self) -> bool:
        return self.q_norm is not None and len(self.q_norm) != self.head_dim

    def __deepcopy__(self, memo: dict[int, object]) -> DecoderSpec:
        return self  # nothing of it changes

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), np.ndarray):
                object.__setattr__(self, f.name, np.ascontiguousarray(value, np.float32))
        hidden, head = self.hidden_size, self.head_dim
        if head <= 0 or head % HEAD_STEP:
            raise ValueError(f"head_dim={head}: must be a multiple of {HEAD_STEP}")
        if not 0 <= self.rotary_dim <= head or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim}: must be even, 0..{head}")
        width, kv_width = self.q.out_features, self.k.out_features
        if width % head or kv_width % head or not kv_width or width % kv_width:
            raise ValueError(
                f"q has {width} and k {kv_width} outputs: must be whole heads of {head}, those of q a multiple of those of k"
            )
        shapes = {"k": (hidden, kv_width), "v": (hidden, kv_width), "o": (width, hidden)}
        if self.mlp is not None:
            inner = self.mlp.gate.out_features
            shapes |= {
                "mlp.gate": (hidden, inner),
                "mlp.up": (hidden, inner),
                "mlp.down": (inner, hidden),
            }
        if self.experts is not None:
            if self.logits is None or self.router is None:
                raise ValueError("experts need logits and a router")
            shapes["logits"] = (hidden, self.router.num_experts)
            if (
                self.experts.spec.hidden_size != hidden
                or self.experts.spec.num_experts != self.router.num_experts
            ):
                raise ValueError(
                    f"{self.experts.spec.num_experts} experts of hidden size {self.experts.spec.hidden_size}: "
                    f"must be {self.router.num_experts} of {hidden}"
                )
        elif self.mlp is None:
            raise ValueError("experts and mlp are None: one of them must be given")
        for name, shape in shapes.items():
            owner = self.mlp if name.startswith("mlp.") else self
            linear = getattr(owner, name.removeprefix("mlp."))
            if (linear.in_features, linear.out_features) != shape:
                raise ValueError(
                    f"{name} is {linear.in_features} -> {linear.out_features}: must be {shape[0]} -> {shape[1]}"
                )
        whole = self.norm_is_whole
        lengths: dict[str, tuple[np.ndarray | None, int]] = {
            "input_norm": (self.input_norm, hidden),
            "output_norm": (self.output_norm, hidden),
            "q_norm": (self.q_norm, width if whole else head),
            "k_norm": (self.k_norm, kv_width if whole else head),
            "sinks": (self.sinks, self.num_heads),
            "mlp.scale": (None if self.mlp is None else self.mlp.scale, hidden),
        }  # fmt: skip
        for name, (array, length) in lengths.items():
            if array is not None and array.shape != (length,):
                raise ValueError(f"{name} has shape {array.shape}: must be ({length},)")


class DecoderLayer:
    """A ``DecoderSpec`` ready to run on the process-wide engine. BackendError if the experts' kernels are not ktk's own in C."""

    def __init__(self, spec: DecoderSpec, num_threads: int | None = None) -> None:
        if reason := linear_why_not():
            raise BackendError(f"ktk.ops.decoder.DecoderLayer cannot run here: {reason}")
        native: Any = native_module()
        runner = None if spec.experts is None else spec.experts.runner
        if runner is not None and not isinstance(getattr(runner, "experts", None), native.Experts):
            assert spec.experts is not None
            raise BackendError(f"{spec.experts.backend} has no native experts to call")
        self.spec = spec
        threads = engine.acquire(self, num_threads)
        borrow(native)
        self.native = native.DecoderLayer(spec, cpu.best_isa(), threads)

    def forward(
        self,
        hidden: np.ndarray,
        cosines: np.ndarray,
        sines: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        num_cached: int,
    ) -> np.ndarray:
        """Append the token's keys and values at row ``num_cached`` and attend to all rows up to it.

        hidden : (hidden_size,), float32, float16 or bf16 bits as uint16, as are keys and values: (num_kv_heads, rows, head_dim),
        each head's rows contiguous. cosines, sines : float32 (rotary_dim / 2,). Returns (hidden_size,) in hidden's dtype.
        Raises ValueError for shapes and dtypes that do not fit.
        """
        spec = self.spec
        wanted: dict[str, tuple[np.ndarray, tuple[int, ...], Any]] = {
            "hidden": (hidden, (spec.hidden_size,), hidden.dtype),
            "cosines": (cosines, (spec.rotary_dim // 2,), np.float32),
            "sines": (sines, (spec.rotary_dim // 2,), np.float32),
            "keys": (keys[:, 0], (spec.num_kv_heads, spec.head_dim), hidden.dtype),
            "values": (values[:, 0], (spec.num_kv_heads, spec.head_dim), hidden.dtype),
        }  # fmt: skip
        for name, (array, shape, dtype) in wanted.items():
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}: must be {np.dtype(dtype)} {shape}"
                )
        size = hidden.dtype.itemsize
        for name, array in (("keys", keys), ("values", values)):
            if array.strides[1:] != (spec.head_dim * size, size) or not array.flags.writeable:
                raise ValueError(f"{name}: each head's rows must be contiguous and writeable")
            if not 0 <= num_cached < array.shape[1]:
                raise ValueError(f"num_cached={num_cached}: {name} has {array.shape[1]} rows")
        out = np.empty_like(hidden)
        hidden, cosines, sines = (np.ascontiguousarray(a) for a in (hidden, cosines, sines))
        self.native.forward(
            hidden.dtype.char, hidden.ctypes.data, cosines.ctypes.data, sines.ctypes.data, keys.ctypes.data,
            keys.strides[0] // size, values.ctypes.data, values.strides[0] // size, num_cached, out.ctypes.data,
        )  # fmt: skip
        return out

    __call__ = forward

    def __deepcopy__(self, memo: dict[int, object]) -> DecoderLayer:
        return self  # nothing of it changes
