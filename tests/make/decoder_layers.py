"""A decoder layer's float weights and inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk.experts.activation import Activation
from ktk.ops.decoder import DecoderSpec, Mlp
from ktk.ops.linear import Linear
from ktk.ops.moe import MoE
from ktk.ops.router import Router, route
from ktk.reference.moe import oracle_activation

HIDDEN, INNER, EXPERTS = 64, 48, 8


class Weights:
    """Float weights of a layer, and its spec: fp32 panels, so that only the order of sums differs from float64."""

    def __init__(
        self, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, seed: int = 0, **fields: Any
    ) -> None:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return np.asarray(rng.standard_normal(shape), np.float32)

        self.w = {
            "q": draw(heads * head_dim, HIDDEN), "k": draw(kv_heads * head_dim, HIDDEN),
            "v": draw(kv_heads * head_dim, HIDDEN), "o": draw(HIDDEN, heads * head_dim) * 0.1,
            "logits": draw(EXPERTS, HIDDEN) * 0.2,
            "gate": draw(INNER, HIDDEN) * 0.2, "up": draw(INNER, HIDDEN) * 0.2, "down": draw(HIDDEN, INNER) * 0.2,
        }  # fmt: skip
        self.experts = [draw(EXPERTS, INNER, HIDDEN) * np.float32(0.2) for _ in range(2)]
        self.experts.append(draw(EXPERTS, HIDDEN, INNER) * np.float32(0.2))
        self.bias = {name: draw(len(self.w[name])) * 0.3 for name in ("q", "k", "v", "logits")}
        dense = {
            name: Linear(w, self.bias.get(name), weight_format="fp32") for name, w in self.w.items()
        }
        parts: dict[str, Any] = {
            "head_dim": head_dim, "rotary_dim": head_dim, "scaling": head_dim**-0.5, "epsilon": 1e-5,
            "input_norm": draw(HIDDEN), "output_norm": draw(HIDDEN),
            "experts": MoE.from_weights(*self.experts, weight_format="fp32"),
            "router": Router(EXPERTS, 3, is_normalised=True), "logits": dense["logits"],
        }  # fmt: skip
        if fields.pop("has_head_norms", False):
            parts |= {"q_norm": draw(head_dim), "k_norm": draw(head_dim), "head_epsilon": 1e-3}
        if fields.pop("has_whole_norms", False):
            parts |= {"q_norm": draw(heads * head_dim), "k_norm": draw(kv_heads * head_dim), "head_epsilon": 1e-3}  # fmt: skip
        if fields.pop("has_sinks", False):
            parts["sinks"] = draw(heads)
        if mlp := fields.pop("mlp", None):
            parts["mlp"] = Mlp(dense["gate"], dense["up"], dense["down"], Activation.silu(), draw(HIDDEN) if mlp == "scaled" else None)  # fmt: skip
        if fields.pop("is_dense", False):
            parts |= {"experts": None, "router": None, "logits": None}
        parts |= {n: dense[n] for n in "qkvo"}
        self.spec = DecoderSpec(**{**parts, **fields})

    def forward(
        self,
        x: np.ndarray,
        cosines: np.ndarray,
        sines: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Float64; keys, values (kv_heads, cached, head_dim). Returns the output, the new key and the new value."""
        s, w = self.spec, {name: v.astype(np.float64) for name, v in self.w.items()}
        norm = lambda a, weight, eps: a / np.sqrt((a * a).mean(-1, keepdims=True) + eps) * weight  # noqa: E731
        residual = x.astype(np.float64)
        n = norm(residual, s.input_norm, s.epsilon)
        q, k, v = (w[name] @ n + self.bias[name] for name in "qkv")
        heads = [a if s.norm_is_whole else a.reshape(-1, s.head_dim) for a in (q, k)]
        if s.q_norm is not None:
            heads = [
                norm(a, weight, s.head_epsilon)
                for a, weight in zip(heads, (s.q_norm, s.k_norm), strict=True)
            ]
        q, k = (rotate(a.reshape(-1, s.head_dim), cosines, sines, s.is_interleaved) for a in heads)
        v = v.reshape(-1, s.head_dim)
        keys, values = (
            np.concatenate([old, new[:, None]], 1)
            for old, new in ((keys.astype(np.float64), k), (values.astype(np.float64), v))
        )
        out = []
        for h in range(s.num_heads):
            kv = h // (s.num_heads // s.num_kv_heads)
            scores = keys[kv] @ q[h] * s.scaling
            sink = [] if s.sinks is None else [s.sinks[h]]
            p = np.exp(np.concatenate([scores, sink]) - scores.max())
            out.append((p / p.sum())[: len(scores)] @ values[kv])
        residual = residual + w["o"] @ np.concatenate(out)
        n = norm(residual, s.output_norm, s.epsilon)
        y = residual
        if s.experts is not None:
            assert s.router is not None
            ids, weights = route(s.router, (w["logits"] @ n + self.bias["logits"])[None])
            for e, weight in zip(ids[0], weights[0], strict=True):
                gate, up, down = (m[e].astype(np.float64) for m in self.experts)
                y = y + weight * (down @ oracle_activation(gate @ n, up @ n, Activation.silu()))
        if s.mlp is not None:
            inner = oracle_activation(w["gate"] @ n, w["up"] @ n, s.mlp.activation)
            scale = 1.0 if s.mlp.scale is None else 1 / (1 + np.exp(-n @ s.mlp.scale))
            y = y + scale * (w["down"] @ inner)
        return y, k, v


def inputs(spec: DecoderSpec, cached: int, seed: int = 1) -> tuple[np.ndarray, ...]:
    """hidden, cosines, sines, keys, values with room for more than one row."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 7, spec.rotary_dim // 2)
    rows = (spec.num_kv_heads, cached + 3, spec.head_dim)
    return (
        rng.standard_normal(HIDDEN).astype(np.float32),
        np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32),
        rng.standard_normal(rows).astype(np.float32), rng.standard_normal(rows).astype(np.float32),
    )  # fmt: skip


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, interleaved: bool) -> np.ndarray:
    half = len(cosines)
    out = x.copy()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out[:, first] = x[:, first] * cosines - x[:, second] * sines
    out[:, second] = x[:, second] * cosines + x[:, first] * sines
    return out
