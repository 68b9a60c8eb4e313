"""DecoderLayer against the same layer in float64, whatever its parts,
the length of its cache and the threads.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.ops import linear
from ktk.ops.components import Attention, Norm, Rotary, RoutedExperts
from ktk.ops.decoder import Branch, DecoderLayer, DecoderSpec, Pages
from ktk.ops.linear import Linear
from ktk.ops.router import Router
from make.children import run_python
from make.decoder_layers import EXPERTS, HIDDEN, Weights, inputs, run_row

if linear.why_not() is not None:
    pytest.skip(str(linear.why_not()), allow_module_level=True)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head each": {"heads": 2, "kv_heads": 2},
    "wide heads": {"heads": 5, "kv_heads": 1, "head_dim": 80},
    "narrow heads": {"heads": 4, "kv_heads": 4, "head_dim": 16},
    "many heads of one key": {"heads": 20, "kv_heads": 1, "head_dim": 16},
    "norms of heads": {"head_norms": "each"},
    "norms of all heads": {"head_norms": "whole"},
    "partly rotated": {"rotary_dim": 16},
    "not rotated": {"rotary_dim": 0},
    "neighbours rotated": {"order": "pairs", "rotary_dim": 20},
    "sinks": {"has_sinks": True},
    "a window": {"window": 21, "has_sinks": True},
    "a wide window": {"window": 300},
    "shared experts": {"mlp": "plain"},
    "scaled shared experts": {"mlp": "scaled"},
    "dense": {"mlp": "plain", "is_dense": True},
    "groups": {
        "router": Router(EXPERTS, 2, "sigmoid", True, 2.5, np.linspace(-1, 1, EXPERTS), 4, 2, 2)
    },
    "norms after": {"norms": "after", "mlp": "plain"},
    "norms before and after": {"norms": "both", "head_norms": "each"},
    "a multiplier": {"multiplier": 0.22, "mlp": "plain"},
    "one norm for all": {"norms": "one", "mlp": "plain"},
    "latents": {"latent": "plain"},
    "latents, a norm inside the query": {"latent": "norm", "order": "pairs", "mlp": "plain"},
    "latents, neighbours put apart": {"latent": "norm", "order": "pairs to halves", "heads": 18},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cached", [0, 1, 37, 255, 256, 700])
def test_layer_is_the_float64_one(name: str, cached: int) -> None:
    weights = Weights(**CASES[name])
    x, cosines, sines, keys, values = inputs(weights.spec, cached)
    want, key, value = weights.forward(x, cosines, sines, keys[:, :cached], values[:, :cached])
    before = keys.copy()
    got = run_row(DecoderLayer(weights.spec), x, cosines, sines, keys, values, cached)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    assert np.allclose(keys[:, cached], key, atol=1e-4)
    assert np.allclose(values[:, cached], value, atol=1e-4)
    untouched = [i for i in range(keys.shape[1]) if i != cached]
    assert np.array_equal(keys[:, untouched], before[:, untouched])


def test_matrices_of_one_row_may_have_different_forms() -> None:
    """Each takes the row as it is, whatever the matrix before has made of it."""
    turned, other, groups = {"rotation": (64, 1)}, {"rotation": (64, 2)}, {"rotation": 0}
    forms = {"q": turned, "k": other, "v": groups, "gate": turned, "up": {"rotation": (256, 1)}}
    weights = Weights(mlp="plain", norms="one", forms=forms)
    x, cosines, sines, keys, values = inputs(weights.spec, 37)
    want, *_ = weights.forward(x, cosines, sines, keys[:, :37], values[:, :37])
    got = run_row(DecoderLayer(weights.spec), x, cosines, sines, keys, values, 37)
    assert np.abs(got - want).max() <= 3e-3 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["float16", "bf16"])
@pytest.mark.parametrize("name", ["norms of heads", "latents, neighbours put apart"])
def test_half_precision_is_rounded_at_the_ends_and_in_the_cache(name: str, dtype: str) -> None:
    weights = Weights(**CASES[name] | {"mlp": "plain"})
    x, cosines, sines, keys, values = inputs(weights.spec, 300)
    narrow, wide = _narrow(dtype), _wide(dtype)
    x, keys, values = (narrow(a) for a in (x, keys, values))
    want, key, _ = weights.forward(
        wide(x), cosines, sines, wide(keys)[:, :300], wide(values)[:, :300]
    )
    got = run_row(DecoderLayer(weights.spec), x, cosines, sines, keys, values, 300)
    bits = 2**-8 if dtype == "bf16" else 2**-11
    assert got.dtype == x.dtype
    assert np.abs(wide(got) - want).max() <= 1.5 * bits * np.abs(want).max()
    assert np.allclose(wide(keys)[:, 300], key, rtol=1.1 * bits, atol=1e-4)


def _narrow(dtype: str) -> Any:
    return f32_to_bf16 if dtype == "bf16" else (lambda a: a.astype(dtype))


def _wide(dtype: str) -> Any:
    return bf16_to_f32 if dtype == "bf16" else (lambda a: a.astype(np.float32))


# --- rows and pages -------------------------------------------------------------------------------

LENGTHS = (0, 5, 300, 511)  # tokens cached of each sequence
# (sequence, how many tokens behind the cached ones): several of one sequence at once, in no order.
ROWS = [(2, 0), (0, 1), (0, 0), (3, 0), (2, 1), (1, 0), (0, 2), (3, 1), (2, 2)]


class Batch:
    """Several sequences' rows, keys and values."""

    def __init__(self, spec: DecoderSpec, dtype: str = "float32") -> None:
        rng = np.random.default_rng(3)
        narrow = _narrow(dtype)
        angles = rng.uniform(0, 7, (len(ROWS), spec.attention.rotary.dim // 2))
        self.hidden = narrow(rng.standard_normal((len(ROWS), HIDDEN)).astype(np.float32))
        self.cosines, self.sines = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        self.cached = [
            [
                narrow(rng.standard_normal((heads, length, width)).astype(np.float32))
                for heads, width in spec.attention.cached_shapes
            ]
            for length in LENGTHS
        ]
        self.positions = [LENGTHS[sequence] + more for sequence, more in ROWS]

    def paged(self, page_tokens: int, tokens_first: bool = False) -> list[list[list[np.ndarray]]]:
        """(sequences, keys or values) pages that hold what is cached, and room for 3 more;
        nonsense elsewhere.
        """
        rng = np.random.default_rng(4)
        found = []
        for keys_values, length in zip(self.cached, LENGTHS, strict=True):
            of_sequence = []
            for cached in keys_values:
                heads, _, width = cached.shape
                pages = []
                for first in range(0, length + 3, page_tokens):
                    shape = (
                        (page_tokens, heads, width) if tokens_first else (heads, page_tokens, width)
                    )
                    page = rng.integers(0, 2**8, (*shape, cached.itemsize), np.uint8).view(
                        cached.dtype
                    )[..., 0]
                    page = page.swapaxes(0, 1) if tokens_first else page
                    held = cached[:, first : first + page_tokens]
                    page[:, : held.shape[1]] = held
                    pages.append(page)
                of_sequence.append(pages)
            found.append(of_sequence)
        return found

    def run(
        self, layer: DecoderLayer, pages: list[list[list[np.ndarray]]], rows: list[int]
    ) -> np.ndarray:
        return layer(
            self.hidden[rows],
            self.cosines[rows],
            self.sines[rows],
            [Pages(*of_sequence) for of_sequence in pages],
            [ROWS[row][0] for row in rows],
            [self.positions[row] for row in rows],
        )


PAGED = [
    "plain",
    "wide heads",
    "a window",
    "norms after",
    "shared experts",
    "latents, neighbours put apart",
]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("name", PAGED)
def test_rows_have_the_same_bits_alone_and_in_any_pages(name: str, dtype: str) -> None:
    weights = Weights(**CASES[name])
    layer = DecoderLayer(weights.spec)
    batch = Batch(weights.spec, dtype)
    alone_pages = batch.paged(1024)
    in_order = sorted(range(len(ROWS)), key=lambda row: ROWS[row][1])
    alone = {row: batch.run(layer, alone_pages, [row])[0] for row in in_order}
    want = np.stack([alone[row] for row in range(len(ROWS))])
    assert np.isfinite(_wide(dtype)(want)).all()
    for page_tokens in (16, 64, 1024):
        for tokens_first in (False, True):
            pages = batch.paged(page_tokens, tokens_first)
            got = batch.run(layer, pages, list(range(len(ROWS))))
            assert np.array_equal(got, want), (page_tokens, tokens_first)
            for row, (sequence, _) in enumerate(ROWS):
                page, place = divmod(batch.positions[row], page_tokens)
                for whole, paged in zip(alone_pages[sequence], pages[sequence], strict=True):
                    written = whole[0][:, batch.positions[row]]
                    assert np.array_equal(paged[page][:, place], written)


def test_rows_of_a_batch_are_the_float64_ones() -> None:
    weights = Weights(head_norms="each", mlp="scaled")
    batch = Batch(weights.spec)
    got = batch.run(DecoderLayer(weights.spec), batch.paged(64), list(range(len(ROWS))))
    cached = [[a.astype(np.float64) for a in keys_values] for keys_values in batch.cached]
    for row in sorted(range(len(ROWS)), key=lambda row: ROWS[row][1]):
        of = cached[ROWS[row][0]]
        want, *new = weights.forward(batch.hidden[row], batch.cosines[row], batch.sines[row], *of)
        assert np.abs(got[row] - want).max() <= 2e-5 * np.abs(want).max(), row
        of[:] = [np.concatenate([a, b[:, None]], 1) for a, b in zip(of, new, strict=True)]


def test_many_rows_over_many_keys_run_in_pieces() -> None:
    """Partial results of all would take more than what attention.c keeps at a time."""
    weights = Weights(heads=16, kv_heads=1, head_dim=256, is_dense=True, mlp="plain")
    layer = DecoderLayer(weights.spec)
    rows, cached = 40, 6000
    rng = np.random.default_rng(5)
    keys, values = (
        rng.standard_normal((1, cached + rows, 256)).astype(np.float32) for _ in range(2)
    )
    x = rng.standard_normal((rows, HIDDEN)).astype(np.float32)
    turns = [f(rng.uniform(0, 7, (rows, 128))).astype(np.float32) for f in (np.cos, np.sin)]
    one = [keys.copy(), values.copy()]
    want = [run_row(layer, x[i], turns[0][i], turns[1][i], *one, cached + i) for i in range(rows)]
    got = layer(x, *turns, [Pages([keys], [values])], [0] * rows, range(cached, cached + rows))
    assert np.array_equal(got, np.stack(want))
    assert np.array_equal(keys, one[0])


def digest() -> str:
    """Of a row over a part of a longer buffer, and of batches over pages."""
    weights = Weights(head_norms="each", mlp="scaled", has_sinks=True)
    x, cosines, sines, keys, values = inputs(weights.spec, 900)
    buffer = np.zeros((2, 2000, 32), np.float32)
    buffer[:, 5:908] = keys
    own = buffer[:, 5:908]
    y = run_row(DecoderLayer(weights.spec), x, cosines, sines, own, values, 900)
    found = hashlib.sha256(y.tobytes() + buffer[:, 905].tobytes())
    for name in ("shared experts", "latents, neighbours put apart"):
        spec = Weights(**CASES[name]).spec
        batch = Batch(spec)
        got = batch.run(DecoderLayer(spec), batch.paged(16), list(range(len(ROWS))))
        found.update(got.tobytes())
    return found.hexdigest()


def test_rows_have_the_same_bits_for_any_number_of_threads() -> None:
    code = """
        import os, sys
        os.environ["KTK_NUM_THREADS"] = sys.argv[1]
        from test_decoder import digest
        print(digest())
    """
    assert len({run_python(code, threads) for threads in ("1", "2", "3", "16")}) == 1


def test_nan_stays_nan() -> None:
    weights = Weights()
    x, cosines, sines, keys, values = inputs(weights.spec, 20)
    layer = DecoderLayer(weights.spec)
    keys[0, 3, 0] = np.nan
    assert np.isnan(run_row(layer, x, cosines, sines, keys, values, 20)).any()
    x[5] = np.inf
    assert not np.isfinite(run_row(layer, x, cosines, sines, keys, values, 20)).all()


def test_nan_of_one_row_stays_in_it() -> None:
    weights = Weights(mlp="plain")
    layer, batch = DecoderLayer(weights.spec), Batch(weights.spec)
    want = batch.run(layer, batch.paged(64), [0, 1, 3])
    batch.hidden[1] = np.nan
    got = batch.run(layer, batch.paged(64), [0, 1, 3])
    assert np.isnan(got[1]).all()
    assert np.array_equal(got[[0, 2]], want[[0, 2]])


# --- what is refused ------------------------------------------------------------------------------


def test_components_that_do_not_fit_are_refused_by_name() -> None:
    spec = Weights(has_sinks=True, head_norms="each", mlp="scaled").spec
    small = Linear(np.zeros((16, HIDDEN), np.float32), weight_format="fp32")
    attention, mlp, routed = spec.components
    assert isinstance(attention, Attention)
    assert isinstance(routed, RoutedExperts)
    for component, fields, message in (
        (attention, {"head_dim": 24}, "multiple of 16"),
        (attention, {"rotary": Rotary(34)}, "dim=34"),
        (attention, {"rotary": Rotary(32, "pairs to halves")}, "order halves or pairs"),
        (attention, {"v": small}, "v is 64 -> 16"),
        (attention, {"k": small}, "whole heads"),
        (attention, {"sinks": np.zeros(3, np.float32)}, "sinks has shape"),
        (attention, {"q_norm": Norm(np.zeros(3, np.float32), 1e-6)}, "q_norm has shape"),
        (attention, {"window": 0}, "window=0"),
        (mlp, {"up": small}, "mlp.up is 64 -> 16"),
        (mlp, {"scale": np.zeros(3, np.float32)}, "mlp.scale has shape"),
        (routed, {"router": Router(4, 1)}, "8 experts"),
        (routed, {"logits": small}, "logits is 64 -> 16"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(component, **fields)  # type: ignore[arg-type]
    latent = Weights(latent="norm").spec.attention
    for fields, message in (
        ({"q_norm": None}, "q_a and q_norm"),
        ({"num_heads": 3}, "multiple of 16"),
        ({"rotary": Rotary(8)}, "rotary.dim=8"),
        ({"o": small}, "o is 64 -> 16"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(latent, **fields)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="order='thirds'"):
        Rotary(32, "thirds")
    with pytest.raises(ValueError, match="even"):
        Rotary(33)


def test_branches_that_do_not_fit_are_refused_by_name() -> None:
    spec = Weights(mlp="plain").spec
    first, second = spec.branches
    with pytest.raises(ValueError, match="norm has shape"):
        replace(first, norm=Norm(np.zeros(3, np.float32), 1e-6))
    with pytest.raises(ValueError, match="must have 1..3"):
        Branch(())
    with pytest.raises(ValueError, match="one component that attends"):
        DecoderSpec((second,))
    with pytest.raises(ValueError, match="one component that attends"):
        DecoderSpec((first, first))


def test_rows_and_pages_that_do_not_fit_are_refused_by_name() -> None:
    spec = Weights().spec
    layer = DecoderLayer(spec)
    x, cosines, sines, keys, values = inputs(spec, 4)
    for given, message in (
        ((x[:5], cosines, sines, keys, values, 4), "hidden is"),
        ((x, cosines[:2], sines, keys, values, 4), "cosines is"),
        (
            (x, cosines, sines, keys.astype(np.float16), values, 4),
            "must have one shape, dtype|keys and values are",
        ),
        ((x, cosines, sines, keys, values, 7), "position=7"),
        ((x, cosines, sines, keys[:, :, ::-1], values, 4), "contiguous"),
        ((x, cosines, sines, keys[:1], values[:1], 4), "keys and values are"),
        ((x, cosines, sines, keys[:, :3], values, 4), "pages of 7 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            run_row(layer, *given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pages of 7 tokens: must be a multiple of 16"):
        Pages([keys, keys], [values, values])
    pages, two = [Pages([keys], [values])], [np.stack([a, a]) for a in (x, cosines, sines)]
    with pytest.raises(ValueError, match="2 rows at 1 places"):
        layer(*two, pages, [0, 0], [4, 4])
    with pytest.raises(ValueError, match="sequence=1"):
        layer(*two, pages, [0, 1], [4, 4])
