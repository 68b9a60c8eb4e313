"""A decoder layer's float weights, the layer in float64, and inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ktk.experts.activation import Activation
from ktk.ops.components import (
    Attention,
    Component,
    LatentAttention,
    Mlp,
    Norm,
    Rotary,
    RoutedExperts,
)
from ktk.ops.decoder import Branch, DecoderLayer, DecoderSpec, Pages
from ktk.ops.linear import Linear
from ktk.ops.moe import MoE
from ktk.ops.router import Router, route
from ktk.reference.moe import oracle_activation

HIDDEN, INNER, EXPERTS = 64, 48, 8
LATENT, NOPE, TURNED, VALUE, Q_RANK = 32, 32, 16, 16, 48  # of latent attention


@dataclass
class Weights:
    """Float weights of a layer, and its spec: fp32 panels,
    so that only the order of sums differs from float64.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int | None = None
    order: str = "halves"
    head_norms: str | None = None  # "each" head, or "whole"
    has_sinks: bool = False
    window: int | None = None
    latent: str | None = None  # latent attention with a "plain" query, or one with a "norm" inside
    mlp: str | None = None  # "plain" or "scaled"
    is_dense: bool = False
    router: Router = field(default_factory=lambda: Router(EXPERTS, 3, is_normalised=True))
    norms: str = "before"  # the components, or "after" them, or "both"; or "one" for all
    multiplier: float = 1.0
    forms: dict[str, dict[str, Any]] = field(default_factory=dict)  # options of Linear by name
    seed: int = 0

    def __post_init__(self) -> None:
        heads, kv_heads, head_dim = self.heads, self.kv_heads, self.head_dim
        rng = np.random.default_rng(self.seed)

        def draw(*shape: int) -> np.ndarray:
            return np.asarray(rng.standard_normal(shape), np.float32)

        self.w = {
            "q": draw(heads * head_dim, HIDDEN),
            "k": draw(kv_heads * head_dim, HIDDEN),
            "v": draw(kv_heads * head_dim, HIDDEN),
            "o": draw(HIDDEN, heads * head_dim) * 0.1,
            "logits": draw(EXPERTS, HIDDEN) * 0.2,
            "gate": draw(INNER, HIDDEN) * 0.2,
            "up": draw(INNER, HIDDEN) * 0.2,
            "down": draw(HIDDEN, INNER) * 0.2,
        }
        self.experts = [draw(EXPERTS, INNER, HIDDEN) * np.float32(0.2) for _ in range(2)]
        self.experts.append(draw(EXPERTS, HIDDEN, INNER) * np.float32(0.2))
        self.bias = {name: draw(len(self.w[name])) * 0.3 for name in ("q", "k", "v", "logits")}
        first, second = Norm(draw(HIDDEN), 1e-5), Norm(draw(HIDDEN), 1e-5)
        feed_forward: list[Component] = []
        attention = self._latent(draw) if self.latent else self._attention(draw)
        if self.mlp:
            scale = draw(HIDDEN) if self.mlp == "scaled" else None
            gate, up, down = (self._linear(n) for n in ("gate", "up", "down"))
            feed_forward.append(Mlp(gate, up, down, Activation.silu(), scale))
        if not self.is_dense:
            experts = MoE.from_weights(*self.experts, weight_format="fp32")
            feed_forward.append(RoutedExperts(experts, self._linear("logits"), self.router))
        if self.norms == "one":
            parts: list[tuple[Component, ...]] = [(attention, *feed_forward)]
        else:
            parts = [(attention,), tuple(feed_forward)]
        branches = []
        for components, norm in zip(parts, (first, second), strict=False):
            after = Norm(draw(HIDDEN), 1e-4) if self.norms in ("after", "both") else None
            before = None if self.norms == "after" else norm
            branches.append(Branch(components, before, after, self.multiplier))
        self.spec = DecoderSpec(tuple(branches))

    def _linear(self, name: str) -> Linear:
        form = self.forms.get(name, {"weight_format": "fp32"})
        return Linear(self.w[name], self.bias.get(name), **form)

    def _attention(self, draw: Any) -> Attention:
        sizes = {"each": [self.head_dim] * 2, "whole": [len(self.w["q"]), len(self.w["k"])]}
        norms = [Norm(draw(size), 1e-3) for size in sizes.get(self.head_norms or "", [])]
        q_norm, k_norm = norms or (None, None)
        rotary = Rotary(self.head_dim if self.rotary_dim is None else self.rotary_dim, self.order)
        return Attention(
            self._linear("q"),
            self._linear("k"),
            self._linear("v"),
            self._linear("o"),
            self.head_dim,
            rotary,
            self.head_dim**-0.5,
            q_norm,
            k_norm,
            draw(self.heads) if self.has_sinks else None,
            self.window,
        )

    def _latent(self, draw: Any) -> LatentAttention:
        heads = self.heads
        has_norm = self.latent == "norm"
        self.w |= {
            "q_a": draw(Q_RANK, HIDDEN),
            "q": draw(heads * (NOPE + TURNED), Q_RANK if has_norm else HIDDEN) * 0.3,
            "latent": draw(LATENT + TURNED, HIDDEN),
            "to_key": draw(heads, NOPE, LATENT) * 0.3,
            "to_value": draw(heads, VALUE, LATENT) * 0.3,
            "o": draw(HIDDEN, heads * VALUE) * 0.1,
        }
        self.bias["q"] = draw(len(self.w["q"])) * 0.3
        absorb = self.w["to_key"].transpose(0, 2, 1).reshape(heads * LATENT, NOPE)
        expand = self.w["to_value"].reshape(heads * VALUE, LATENT)
        return LatentAttention(
            heads,
            self._linear("q"),
            self._linear("latent"),
            Norm(draw(LATENT), 1e-3),
            Linear(absorb, weight_format="fp32"),
            Linear(expand, weight_format="fp32"),
            self._linear("o"),
            Rotary(TURNED, self.order),
            (NOPE + TURNED) ** -0.5,
            self._linear("q_a") if has_norm else None,
            Norm(draw(Q_RANK), 1e-3) if has_norm else None,
        )

    def forward(
        self,
        x: np.ndarray,
        cosines: np.ndarray,
        sines: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Float64; keys, values (heads, cached, width).

        Returns the output, the new key and the new value.
        """
        residual, key, value = x.astype(np.float64), keys, values
        seen = cosines, sines, keys, values
        for branch in self.spec.branches:
            n, y = norm(residual, branch.norm), np.zeros(HIDDEN)
            for part in branch.components:
                if isinstance(part, Mlp):
                    y = y + self._mlp_of(part, n)
                elif isinstance(part, RoutedExperts):
                    y = y + self._experts_of(part, n)
                elif isinstance(part, Attention):
                    attended, key, value = self._attend(part, n, *seen)
                    y = y + attended
                else:
                    attended, key, value = self._attend_to_latents(part, n, *seen)
                    y = y + attended
            residual = residual + branch.multiplier * norm(y, branch.output_norm)
        return residual, key, value

    def _times(self, name: str, x: np.ndarray) -> np.ndarray:
        if name in self.forms:  # rounded: by itself, as it is tested elsewhere
            row: np.ndarray = self._linear(name)(x[None].astype(np.float32))[0]
            return row
        return self.w[name].astype(np.float64) @ x + self.bias.get(name, 0)

    def _attend(
        self,
        s: Attention,
        n: np.ndarray,
        cosines: np.ndarray,
        sines: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        heads = []
        for name, its_norm in (("q", s.q_norm), ("k", s.k_norm)):
            y = self._times(name, n)
            wide = its_norm is not None and len(its_norm.weight) != s.head_dim
            y = norm(y if wide else y.reshape(-1, s.head_dim), its_norm)
            heads.append(rotate(y.reshape(-1, s.head_dim), cosines, sines, s.rotary.order))
        (q, k), v = heads, self._times("v", n).reshape(-1, s.head_dim)
        keys, values = appended(keys, k), appended(values, v)
        seen = slice(-s.window if s.window else None, None)
        out = []
        for h in range(s.num_heads):
            kv = h // (s.num_heads // s.num_kv_heads)
            scores = keys[kv, seen] @ q[h] * s.scaling
            p = softmax(scores, [] if s.sinks is None else [s.sinks[h]])
            out.append(p @ values[kv, seen])
        return self._times("o", np.concatenate(out)), k, v

    def _attend_to_latents(
        self,
        s: LatentAttention,
        n: np.ndarray,
        cosines: np.ndarray,
        sines: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As it is defined: latents expanded to keys and values of all heads."""
        q = self._times("q", norm(self._times("q_a", n), s.q_norm) if s.q_a is not None else n)
        q = q.reshape(s.num_heads, NOPE + TURNED)
        latent, turned = np.split(self._times("latent", n), [LATENT])
        latent, turned = (
            norm(latent, s.latent_norm),
            rotate(turned[None], cosines, sines, s.rotary.order),
        )
        q_turned = rotate(q[:, NOPE:], cosines, sines, s.rotary.order)
        keys, values = appended(keys, latent[None]), appended(values, turned)
        out = []
        for h in range(s.num_heads):
            k = np.concatenate([keys[0] @ self.w["to_key"][h].T, values[0]], 1)
            p = softmax(k @ np.concatenate([q[h, :NOPE], q_turned[h]]) * s.scaling, [])
            out.append(p @ (keys[0] @ self.w["to_value"][h].T))
        return self._times("o", np.concatenate(out)), latent[None], turned

    def _mlp_of(self, mlp: Mlp, n: np.ndarray) -> np.ndarray:
        h = oracle_activation(self._times("gate", n), self._times("up", n), mlp.activation)
        scale = 1.0 if mlp.scale is None else 1 / (1 + np.exp(-n @ mlp.scale))
        return np.asarray(scale * self._times("down", h))

    def _experts_of(self, part: RoutedExperts, n: np.ndarray) -> np.ndarray:
        ids, weights = route(part.router, self._times("logits", n)[None])
        y = np.zeros(HIDDEN)
        for e, weight in zip(ids[0], weights[0], strict=True):
            gate, up, down = (m[e].astype(np.float64) for m in self.experts)
            y = y + weight * (down @ oracle_activation(gate @ n, up @ n, Activation.silu()))
        return y


def norm(x: np.ndarray, its: Norm | None) -> np.ndarray:
    if its is None:
        return x
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + its.epsilon) * its.weight)


def softmax(scores: np.ndarray, sinks: list[float]) -> np.ndarray:
    p = np.exp(np.concatenate([scores, sinks]) - scores.max())
    return np.asarray((p / p.sum())[: len(scores)])


def appended(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.concatenate([old.astype(np.float64), new[:, None]], 1)


def inputs(spec: DecoderSpec, cached: int, seed: int = 1) -> tuple[np.ndarray, ...]:
    """hidden, cosines, sines of one row; keys, values with room for more than one."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 7, spec.attention.rotary.dim // 2)
    keys, values = ((heads, cached + 3, width) for heads, width in spec.attention.cached_shapes)
    return (
        rng.standard_normal(HIDDEN).astype(np.float32),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
        rng.standard_normal(keys).astype(np.float32),
        rng.standard_normal(values).astype(np.float32),
    )


def run_row(
    layer: DecoderLayer,
    x: np.ndarray,
    cosines: np.ndarray,
    sines: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    cached: int,
) -> np.ndarray:
    """One row of one sequence in one page."""
    pages = Pages([keys], [values])
    return layer(x[None], cosines[None], sines[None], [pages], [0], [cached])[0]


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, order: str) -> np.ndarray:
    half = len(cosines)
    out = x.copy()
    halves, pairs = (
        (slice(0, half), slice(half, 2 * half)),
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)),
    )
    first, second = halves if order == "halves" else pairs
    to_first, to_second = pairs if order == "pairs" else halves
    out[:, to_first] = x[:, first] * cosines - x[:, second] * sines
    out[:, to_second] = x[:, second] * cosines + x[:, first] * sines
    return out
