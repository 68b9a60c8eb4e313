"""Keys and values in another dtype than the rows: what is written, and what attention reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.ops import linear
from ktk.ops.components import Attention, Component
from ktk.ops.decoder import DecoderLayer, Pages
from ktk.ops.linear import Linear
from ktk.reference.cached_rows import float_rows, int8_rows
from make.decoder_layers import HIDDEN, Weights

if linear.why_not() is not None:
    pytest.skip(str(linear.why_not()), allow_module_level=True)

NARROW: dict[str, Any] = {
    "fp32": lambda x: x,
    "fp16": lambda x: x.astype(np.float16),
    "bf16": f32_to_bf16,
    "int8": int8_rows,
}
WIDE: dict[str, Any] = {
    "fp32": lambda x: x,
    "fp16": lambda x: x.astype(np.float32),
    "bf16": bf16_to_f32,
    "int8": float_rows,
}
LAYERS: dict[str, dict[str, Any]] = {
    "groups": {"heads": 4, "kv_heads": 2, "head_dim": 80},
    "a window": {"window": 21, "has_sinks": True},
    "latents": {"latent": "norm", "order": "pairs"},
}
CACHED, ROWS = 300, 3


def draw(*shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Layer:
    """A layer, rows that follow each other, and what is cached before them."""

    def __init__(self, name: str) -> None:
        weights = Weights(**LAYERS[name])

        def without_bias(c: Component) -> Component:
            if not isinstance(c, Attention):
                return c
            k, v = (Linear(weights.w[name], weight_format="fp32") for name in "kv")
            return replace(c, k=k, v=v)

        self.layer = DecoderLayer(weights.spec.mapped(without_bias))
        attention = self.layer.spec.attention
        angles = draw(ROWS, attention.rotary.dim // 2)
        self.turns = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
        self.hidden = draw(ROWS, HIDDEN)
        self.hidden[1] = 0  # its key and value are zeros, which every dtype has
        self.cached = [
            draw(heads, CACHED + ROWS, width, seed=heads + width)
            for heads, width in attention.cached_shapes
        ]

    def run(self, pages: list[list[np.ndarray]], rows: list[int]) -> np.ndarray:
        """pages : of keys, of values."""
        turns = [turn[rows] for turn in self.turns]
        places = [CACHED + row for row in rows]
        return self.layer(self.hidden[rows], *turns, [Pages(*pages)], [0] * len(rows), places)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_rounded_once_and_attention_reads_what_was_written(name: str, dtype: str) -> None:
    """Bit by bit: a row is that of a float32 cache, rounded; its attention that of a float32 cache
    that holds what was read.
    """
    own = Layer(name)
    exact = [[a.copy()] for a in own.cached]
    own.run(exact, [0])
    kept = [[NARROW[dtype](a)] for a in own.cached]
    got = own.run(kept, [0])
    for (want,), (found,) in zip(exact, kept, strict=True):
        np.testing.assert_array_equal(NARROW[dtype](want[:, CACHED]), found[:, CACHED])
    read = [[WIDE[dtype](a)] for (a,) in kept]
    np.testing.assert_array_equal(own.run(read, [1]), own.run(kept, [1]))
    assert np.isfinite(got).all() and got.std() > 0


@pytest.mark.parametrize("name", LAYERS)
def test_int8_pages_give_the_bits_of_one_buffer_in_any_batch(name: str) -> None:
    own = Layer(name)
    whole = [[int8_rows(a)] for a in own.cached]
    want = np.concatenate([own.run(whole, [row]) for row in range(ROWS)])
    paged = []
    for a in own.cached:
        rows = int8_rows(a)
        room = np.full((rows.shape[0], -rows.shape[1] % 64, rows.shape[2]), -1, np.int8)
        rows = np.concatenate([rows, room], 1)
        paged.append([np.ascontiguousarray(p) for p in np.split(rows, rows.shape[1] // 64, 1)])
    np.testing.assert_array_equal(want, own.run(paged, list(range(ROWS))))
    for (one,), pages in zip(whole, paged, strict=True):
        rows = np.concatenate(pages, 1)[:, : CACHED + ROWS]
        np.testing.assert_array_equal(one, rows)


def test_nothing_of_a_row_that_cannot_be_scaled_is_taken_for_a_number() -> None:
    own = Layer("groups")
    own.hidden[0, 3] = np.nan
    kept = [[int8_rows(a)] for a in own.cached]
    assert np.isnan(own.run(kept, [0])).all()
    assert np.isnan(float_rows(kept[0][0][:, CACHED])).all()
    zeros = int8_rows(np.zeros((2, 32), np.float32))
    assert not zeros.any() and not float_rows(zeros).any()


def test_another_dtype_of_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="int16: must be float32, float16, uint16 .bf16. or int8"):
        Pages([np.zeros((2, 16, 32), np.int16)], [np.zeros((2, 16, 32), np.int16)])
