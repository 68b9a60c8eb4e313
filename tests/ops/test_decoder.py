"""DecoderLayer against the same layer in float64, whatever its parts, the length of its cache and the threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.ops import linear
from ktk.ops.decoder import DecoderLayer
from ktk.ops.linear import Linear
from ktk.ops.router import Router
from make import TESTS
from make.decoder_layers import EXPERTS, HIDDEN, Weights, inputs

if linear.why_not() is not None:
    pytest.skip(str(linear.why_not()), allow_module_level=True)


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
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np, hashlib\n"
        "from make.decoder_layers import Weights, inputs\n"
        "from ktk.ops.decoder import DecoderLayer\n"
        "w = Weights(has_head_norms=True, mlp='scaled', has_sinks=True)\n"
        "x, c, s, k, v = inputs(w.spec, 900)\n"
        "buffer = np.zeros((2, 2000, 32), np.float32); buffer[:, 5:908] = k\n"
        "y = DecoderLayer(w.spec)(x, c, s, buffer[:, 5:], v, 900)\n"
        "print(hashlib.sha256(y.tobytes() + buffer[:, 905].tobytes()).hexdigest())\n"
    )
    found = set()
    for threads in ("1", "2", "3", "8"):
        done = subprocess.run(
            [sys.executable, "-c", code, TESTS], env={**os.environ, "KTK_NUM_THREADS": threads},
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
