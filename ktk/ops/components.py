"""What a decoder layer is made of: values that describe each component,
as ``_cy/include/ktk_decoder.h`` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from ktk.experts.activation import Activation
from ktk.experts.lora import ExpertLora
from ktk.ops.linear import Linear
from ktk.ops.router import Router
from ktk.ops.streamed import AnyMoE

DIM_STEP = 16  # widths of keys and values are multiples of it
ROTARY_ORDERS = ("halves", "pairs", "pairs to halves")


def _check_width(name: str, width: int) -> None:
    if width <= 0 or width % DIM_STEP:
        raise ValueError(f"{name}={width}: must be a multiple of {DIM_STEP}")


def _check_linear(name: str, linear: Linear, in_features: int, out_features: int) -> None:
    if (linear.in_features, linear.out_features) != (in_features, out_features):
        raise ValueError(
            f"{name} is {linear.in_features} -> {linear.out_features}: "
            f"must be {in_features} -> {out_features}"
        )


def _floats(name: str, array: np.ndarray | None, length: int) -> np.ndarray | None:
    """As contiguous float32 (length,)."""
    if array is None:
        return None
    flat = np.ascontiguousarray(array, np.float32)
    if flat.shape != (length,):
        raise ValueError(f"{name} has shape {flat.shape}: must be ({length},)")
    return flat


@dataclass(frozen=True, eq=False)
class Norm:
    """x / sqrt(mean(x^2) + epsilon) * weight. weight : float32 (size,)."""

    weight: np.ndarray
    epsilon: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", np.ascontiguousarray(self.weight, np.float32))

    def check(self, name: str, *sizes: int) -> None:
        """Raises ValueError unless its size is one of these."""
        if self.weight.shape not in [(size,) for size in sizes]:
            allowed = " or ".join(f"({size},)" for size in sizes)
            raise ValueError(f"{name} has shape {self.weight.shape}: must be {allowed}")


@dataclass(frozen=True)
class Rotary:
    """The first ``dim`` of a head turn.

    order : which two turn together: "halves", half of dim apart; "pairs", neighbours; "pairs to
    halves", neighbours that are put half of dim apart.
    """

    dim: int
    order: str = "halves"

    def __post_init__(self) -> None:
        if self.order not in ROTARY_ORDERS:
            raise ValueError(f"order={self.order!r}: must be one of {', '.join(ROTARY_ORDERS)}")
        if self.dim < 0 or self.dim % 2:
            raise ValueError(f"dim={self.dim}: must be even, at least 0")


@dataclass(frozen=True, eq=False)
class Attention:
    """Groups of query heads over the keys and values of one head.

    q, k, v, o : projections. q_norm, k_norm : of each head (head_dim,), or of all (heads *
    head_dim,), or None; then the rotation. scaling : of scores. sinks : float32 (num_heads,), a
    score without a value, or None. window : the last tokens that a token sees, itself included;
    None: all. Raises ValueError if shapes do not fit.
    """

    kind: ClassVar[str] = "attention"
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    head_dim: int
    rotary: Rotary
    scaling: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: np.ndarray | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        head = self.head_dim
        _check_width("head_dim", head)
        if self.rotary.dim > head or self.rotary.order == "pairs to halves":
            raise ValueError(f"{self.rotary}: dim must be 0..{head}, order halves or pairs")
        width, kv_width = self.q.out_features, self.k.out_features
        if width % head or kv_width % head or not kv_width or width % kv_width:
            raise ValueError(
                f"q has {width} and k {kv_width} outputs: must be whole heads of {head}, "
                "those of q a multiple of those of k"
            )
        _check_linear("k", self.k, self.hidden_size, kv_width)
        _check_linear("v", self.v, self.hidden_size, kv_width)
        _check_linear("o", self.o, width, self.hidden_size)
        if self.q_norm is not None:
            self.q_norm.check("q_norm", head, width)
        if self.k_norm is not None:
            self.k_norm.check("k_norm", head, kv_width)
        object.__setattr__(self, "sinks", _floats("sinks", self.sinks, self.num_heads))
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1")

    @property
    def hidden_size(self) -> int:
        return self.q.in_features

    @property
    def num_heads(self) -> int:
        return self.q.out_features // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.k.out_features // self.head_dim

    @cached_property
    def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of a token's keys and values."""
        shape = (self.num_kv_heads, self.head_dim)
        return shape, shape


@dataclass(frozen=True, eq=False)
class LatentAttention:
    """DeepSeek's attention over latents, absorbed: cached are latents, and the part of keys that
    turns.

    q_a, q_norm : what stands before q, or None; then q. A head's query: nope_dim, then rotary.dim.
    latent : hidden -> latent_dim + rotary.dim, the former normed. absorb : nope_dim -> num_heads *
    latent_dim, what makes keys of latents, transposed, a head's outputs behind the other's. expand
    : latent_dim -> num_heads * value_dim, what makes values. Raises ValueError if shapes do not
    fit.
    """

    kind: ClassVar[str] = "latent_attention"
    num_heads: int
    q: Linear
    latent: Linear
    latent_norm: Norm
    absorb: Linear
    expand: Linear
    o: Linear
    rotary: Rotary
    scaling: float
    q_a: Linear | None = None
    q_norm: Norm | None = None

    def __post_init__(self) -> None:
        heads, turned = self.num_heads, self.rotary.dim
        for name in ("nope_dim", "latent_dim", "value_dim"):
            _check_width(name, getattr(self, name))
        _check_width("rotary.dim", turned)
        if (self.q_a is None) != (self.q_norm is None):
            raise ValueError("q_a and q_norm: must both be given or both be None")
        if self.q_a is not None and self.q_norm is not None:
            self.q_norm.check("q_norm", self.q_a.out_features)
            _check_linear("q_a", self.q_a, self.hidden_size, self.q.in_features)
        _check_linear("q", self.q, self.q.in_features, heads * (self.nope_dim + turned))
        _check_linear("latent", self.latent, self.hidden_size, self.latent_dim + turned)
        self.latent_norm.check("latent_norm", self.latent_dim)
        _check_linear("absorb", self.absorb, self.nope_dim, heads * self.latent_dim)
        _check_linear("expand", self.expand, self.latent_dim, heads * self.value_dim)
        _check_linear("o", self.o, heads * self.value_dim, self.hidden_size)

    @property
    def hidden_size(self) -> int:
        return (self.q if self.q_a is None else self.q_a).in_features

    @property
    def nope_dim(self) -> int:
        return self.absorb.in_features

    @property
    def latent_dim(self) -> int:
        return self.expand.in_features

    @property
    def value_dim(self) -> int:
        return self.expand.out_features // self.num_heads

    @cached_property
    def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of a token's latent and of the part that turns."""
        return (1, self.latent_dim), (1, self.rotary.dim)


@dataclass(frozen=True, eq=False)
class Mlp:
    """Dense or shared experts: down(act(gate(x)) * up(x)), times sigmoid(x . scale) if there is a
    scale.

    scale : float32 (hidden_size,). Raises ValueError if shapes do not fit.
    """

    kind: ClassVar[str] = "mlp"
    gate: Linear
    up: Linear
    down: Linear
    activation: Activation
    scale: np.ndarray | None = None

    def __post_init__(self) -> None:
        hidden, inner = self.hidden_size, self.gate.out_features
        _check_linear("mlp.up", self.up, hidden, inner)
        _check_linear("mlp.down", self.down, inner, hidden)
        object.__setattr__(self, "scale", _floats("mlp.scale", self.scale, hidden))

    @property
    def hidden_size(self) -> int:
        return self.gate.in_features


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """Experts that a router chooses by logits, hidden_size -> num_experts.

    lora : adapters of the experts, which drop nothing; the arrays are used, not copied. Raises
    ValueError if shapes do not fit, or for adapters of experts that come and go.
    """

    kind: ClassVar[str] = "routed"
    experts: AnyMoE
    logits: Linear
    router: Router
    lora: ExpertLora | None = None

    def __post_init__(self) -> None:
        spec = self.experts.spec
        if spec.num_experts != self.router.num_experts:
            raise ValueError(
                f"{spec.num_experts} experts: the router must choose among as many, "
                f"not {self.router.num_experts}"
            )
        _check_linear("logits", self.logits, spec.hidden_size, spec.num_experts)
        if self.lora is not None:
            self.lora.check(spec)
            if self.lora.dropout or self.experts.is_streamed:
                raise ValueError("adapters: must drop nothing, of experts that stay in memory")

    @property
    def hidden_size(self) -> int:
        return self.experts.spec.hidden_size


Component = Attention | LatentAttention | Mlp | RoutedExperts
