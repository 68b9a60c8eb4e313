"""DecoderLayer against the same layer in float64, whatever its parts, the length of its cache and the threads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ktk import linear
from ktk.decoder import DecoderLayer, DecoderSpec, Mlp
from ktk.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.linear import Linear
from ktk.moe import MoE
from ktk.reference.moe import oracle_activation
from ktk.routing import Router, route
from ktk.types import Activation

if linear.why_not() is not None:
    pytest.skip(str(linear.why_not()), allow_module_level=True)

HIDDEN, INNER, EXPERTS = 64, 48, 8


class Weights:
    """Float weights of a layer, and its spec: fp32 panels, so that only the order of sums differs from float64."""

    def __init__(
        self, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, seed: int = 0, **fields: Any
    ) -> None:
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
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
        self.spec = DecoderSpec(**{**parts, **fields}, **{n: dense[n] for n in "qkvo"})

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
            h = oracle_activation(w["gate"] @ n, w["up"] @ n, s.mlp.activation)
            scale = 1.0 if s.mlp.scale is None else 1 / (1 + np.exp(-n @ s.mlp.scale))
            y = y + scale * (w["down"] @ h)
        return y, k, v


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, interleaved: bool) -> np.ndarray:
    half = len(cosines)
    out = x.copy()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out[:, first] = x[:, first] * cosines - x[:, second] * sines
    out[:, second] = x[:, second] * cosines + x[:, first] * sines
    return out


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


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head each": {"heads": 2, "kv_heads": 2},
    "wide heads": {"heads": 5, "kv_heads": 1, "head_dim": 80},
    "narrow heads": {"heads": 4, "kv_heads": 4, "head_dim": 16},
    "norms of heads": {"has_head_norms": True},
    "norms of all heads": {"has_whole_norms": True},
    "partly rotated": {"rotary_dim": 16},
    "not rotated": {"rotary_dim": 0},
    "neighbours rotated": {"is_interleaved": True, "rotary_dim": 20},
    "sinks": {"has_sinks": True},
    "shared experts": {"mlp": "plain"},
    "scaled shared experts": {"mlp": "scaled"},
    "dense": {"mlp": "plain", "is_dense": True},
    "groups": {
        "router": Router(EXPERTS, 2, "sigmoid", True, 2.5, np.linspace(-1, 1, EXPERTS), 4, 2, 2)
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cached", [0, 1, 37, 255, 256, 700])
def test_layer_is_the_float64_one(name: str, cached: int) -> None:
    weights = Weights(**CASES[name])
    x, cosines, sines, keys, values = inputs(weights.spec, cached)
    want, key, value = weights.forward(x, cosines, sines, keys[:, :cached], values[:, :cached])
    before = keys.copy()
    got = DecoderLayer(weights.spec)(x, cosines, sines, keys, values, cached)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    assert np.allclose(keys[:, cached], key, atol=1e-4)
    assert np.allclose(values[:, cached], value, atol=1e-4)
    untouched = [i for i in range(keys.shape[1]) if i != cached]
    assert np.array_equal(keys[:, untouched], before[:, untouched])


@pytest.mark.parametrize("dtype", ["float16", "bf16"])
def test_half_precision_is_rounded_at_the_ends_and_in_the_cache(dtype: str) -> None:
    weights = Weights(has_head_norms=True, mlp="plain")
    x, cosines, sines, keys, values = inputs(weights.spec, 300)
    narrow = f32_to_bf16 if dtype == "bf16" else (lambda a: a.astype(np.float16))
    wide = bf16_to_f32 if dtype == "bf16" else (lambda a: a.astype(np.float32))
    x, keys, values = (narrow(a) for a in (x, keys, values))
    want, key, _ = weights.forward(wide(x), cosines, sines, wide(keys)[:, :300], wide(values)[:, :300])  # fmt: skip
    got = DecoderLayer(weights.spec)(x, cosines, sines, keys, values, 300)
    bits = 2**-8 if dtype == "bf16" else 2**-11
    assert got.dtype == x.dtype
    assert np.abs(wide(got) - want).max() <= 1.5 * bits * np.abs(want).max()
    assert np.allclose(wide(keys)[:, 300], key, rtol=1.1 * bits, atol=1e-4)


def test_rows_of_a_longer_buffer_and_any_number_of_threads() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import numpy as np, hashlib\n"
        "from test_decoder import Weights, inputs\n"
        "from ktk.decoder import DecoderLayer\n"
        "w = Weights(has_head_norms=True, mlp='scaled', has_sinks=True)\n"
        "x, c, s, k, v = inputs(w.spec, 900)\n"
        "buffer = np.zeros((2, 2000, 32), np.float32); buffer[:, 5:908] = k\n"
        "y = DecoderLayer(w.spec)(x, c, s, buffer[:, 5:], v, 900)\n"
        "print(hashlib.sha256(y.tobytes() + buffer[:, 905].tobytes()).hexdigest())\n"
    )
    found = set()
    for threads in ("1", "2", "3", "8"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**__import__("os").environ, "KTK_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1, "bits depend on the number of threads"


def test_nan_stays_nan() -> None:
    weights = Weights()
    x, cosines, sines, keys, values = inputs(weights.spec, 20)
    layer = DecoderLayer(weights.spec)
    keys[0, 3, 0] = np.nan
    assert np.isnan(layer(x, cosines, sines, keys, values, 20)).any()
    x[5] = np.inf
    assert not np.isfinite(layer(x, cosines, sines, keys, values, 20)).all()


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    weights = Weights()
    spec = weights.spec
    small = Linear(np.zeros((16, HIDDEN), np.float32), weight_format="fp32")
    for fields, message in (
        ({"head_dim": 24}, "multiple of 16"),
        ({"rotary_dim": 33}, "rotary_dim=33"),
        ({"v": small}, "v is 64 -> 16"),
        ({"k": small}, "whole heads"),
        ({"router": None}, "need logits and a router"),
        ({"experts": None}, "one of them"),
        ({"router": Router(4, 1)}, "8 experts"),
        ({"input_norm": np.zeros(3, np.float32)}, "input_norm has shape"),
        ({"sinks": np.zeros(3, np.float32)}, "sinks has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(spec, **fields)  # type: ignore[arg-type]
    layer = DecoderLayer(spec)
    x, cosines, sines, keys, values = inputs(spec, 4)
    for given, message in (
        ((x[:5], cosines, sines, keys, values, 4), "hidden is"),
        ((x, cosines[:2], sines, keys, values, 4), "cosines is"),
        ((x, cosines, sines, keys.astype(np.float16), values, 4), "keys is"),
        ((x, cosines, sines, keys, values, 7), "num_cached=7"),
        ((x, cosines, sines, keys[:, :, ::-1], values, 4), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*given)  # type: ignore[arg-type]
