"""`ktk bench` on GGUF blocks: any type the kernels read, checked before it is measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ktk._cy import native_module
from ktk.backends.native import kernel_isa
from ktk.bench import layer as bench_layer
from ktk.bench.blocks import has_quantiser, in_turns, random_matrix, row_bytes
from ktk.bench.layer import BlocksLayer, build, check_memory, hidden_states, parse_method
from ktk.bench.roofline import peak_of_blocks, peaks
from ktk.bench.shapes import SHAPES, Shape, routings
from ktk.experts.dequantise import dequantise
from ktk.experts.formats import BLOCKS, PANELS
from ktk.placement.blocks import kernel_types
from make.forked import ktk

if native_module() is None:
    pytest.skip("the compiled extension is not built", allow_module_level=True)

TINY = Shape("tiny", 256, 256, 5, 2)


def layer(method: str, shape: Shape = TINY) -> BlocksLayer:
    made = build(shape, parse_method(method), None)
    assert isinstance(made, BlocksLayer)
    return made


@pytest.mark.parametrize(
    ("text", "kind", "is_repacked"),
    [
        ("LLAMAFILE:Q4_K", "Q4_K", False),
        ("llamafile:bf16", "BF16", False),
        ("LLAMAFILE:Q4_K:repack", "Q4_K", True),
        ("Llamafile:iq2_xxs:REPACK", "IQ2_XXS", True),
        ("q4_k:repack", "Q4_K", True),
    ],
)
def test_methods_over_blocks_are_read(text: str, kind: str, is_repacked: bool) -> None:
    found = parse_method(text)
    assert (found.text, found.backend, found.weight_format) == (text, "LLAMAFILE", "gguf")
    assert (found.block_type, found.is_repacked, found.group_size) == (kind, is_repacked, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LLAMAFILE", "AVX2:INT4:128 or LLAMAFILE:Q4_K"),
        ("LLAMAFILE:INT4", "'INT4': must be one of IQ1_S, TQ1_0"),
        ("LLAMAFILE:Q4_K:64", "behind a GGUF type only :repack or :ggml"),
        ("LLAMAFILE:Q4_K:repack:2", "nothing may stand behind 'repack'"),
        ("AVX2:Q4_K", f"format 'Q4_K': must be one of {', '.join(PANELS)}"),
        ("AVX2:GGUF", "format 'GGUF': must be one of"),
    ],
)
def test_methods_that_are_none_say_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="must be FORMAT") as caught:
        parse_method(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("repack", ["", ":repack"])
@pytest.mark.parametrize("kind", tuple(BLOCKS))
def test_a_layer_of_any_type_agrees_with_its_reference(kind: str, repack: str) -> None:
    made = layer(f"LLAMAFILE:{kind}{repack}")
    assert TINY.hidden_size == TINY.intermediate_size
    bits = BLOCKS[kind].row_bytes(TINY.hidden_size) * 8 / TINY.hidden_size
    assert made.bits_per_weight == bits
    assert made.expert_bytes == TINY.num_weights * bits / 8
    assert made.layer_bytes == 5 * made.expert_bytes
    assert f" {kind}" in made.kernel and ("repacked" in made.kernel) == bool(repack)
    assert made.peak in {p.name for p in peaks() if not p.missing}
    for tokens in (1, 2, 33):
        made.check(hidden_states(TINY, tokens), routings(TINY, tokens, 1, seed=tokens)[0])


def test_a_layer_that_computes_wrong_is_not_measured() -> None:
    made = layer("LLAMAFILE:Q8_0")
    right = made.call
    hidden, routing = hidden_states(TINY, 4), routings(TINY, 4, 1, seed=0)[0]
    made.call = lambda *a: right(*a) * np.float32(1.05)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"Q8_0.*differs from the reference by 0.0[3-9]"):
        made.check(hidden, routing)
    made.call = lambda *a: np.full_like(right(*a), np.nan)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="differs from the reference"):
        made.check(hidden, routing)


def test_floats_are_held_to_their_own_bound() -> None:
    made = layer("LLAMAFILE:F32")
    right = made.call
    made.call = lambda *a: right(*a) * np.float32(1 + 5e-6)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="differs from the reference by 4.9e-06"):
        made.check(hidden_states(TINY, 4), routings(TINY, 4, 1, seed=0)[0])


@pytest.mark.parametrize("kind", tuple(BLOCKS))
def test_random_blocks_sum_to_nothing(kind: str) -> None:
    matrix = random_matrix(kind, 1, 64, 2048, seed=0)
    weights = dequantise(matrix, 0).astype(np.float64)
    assert abs(weights.mean()) < 0.1 * np.sqrt((weights**2).mean())


def test_a_layer_whose_bits_depend_on_the_batch_is_not_measured() -> None:
    made = layer("LLAMAFILE:Q8_0")
    right = made.call
    made.call = lambda *a: right(*a) * np.float32(1 + 1e-6 * len(a[0]))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="gives token 0 other bits alone than in a batch"):
        made.check(hidden_states(TINY, 9), routings(TINY, 9, 1, seed=0)[0])


def test_two_experts_take_turns_each_in_memory_of_its_own() -> None:
    matrix = random_matrix("Q4_0", 2, 32, 64, seed=1)
    spread = in_turns(matrix, 5)
    for e in range(5):
        assert np.array_equal(spread.data[e], matrix.data[e % 2])
    assert not np.shares_memory(spread.data[0], spread.data[2])
    assert spread.data.ctypes.data % (2 << 20) == 0
    assert not np.array_equal(matrix.data[0], matrix.data[1])


def test_types_ktk_quantises_to_hold_normal_weights() -> None:
    assert [k for k in kernel_types() if has_quantiser(k)] == [
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q8_0",
        "Q4_K",
        "Q6_K",
        "MXFP4",
    ]
    weights = bench_layer.expert_weights(layer("LLAMAFILE:Q4_K").two, 1)
    assert 0.015 < weights.up.std() < 0.025


def test_rows_that_are_not_whole_blocks_are_refused_with_the_types_that_fit() -> None:
    assert row_bytes("Q4_K", 512) == 288
    with pytest.raises(
        ValueError, match=r"rows of 2880 weights: Q4_K needs a multiple of 256; F32.*Q4_0"
    ):
        row_bytes("Q4_K", 2880)
    shape, method = SHAPES["gpt-oss-120b"], parse_method("LLAMAFILE:Q4_K")
    with pytest.raises(ValueError, match="gpt-oss-120b: rows of 2880"):
        check_memory(shape, [method], 0)
    check_memory(TINY, [parse_method("LLAMAFILE:MXFP4"), method], 0)


@pytest.mark.parametrize(
    ("isa", "kind", "peak"),
    [
        ("avx512bf16", "BF16", "avx512 bf16"),
        ("avx512bf16", "F16", "avx512 fp32"),
        ("avx512bf16", "IQ3_S", "avx512vnni int8"),
        ("avx512vnni", "BF16", "avx512 fp32"),
        ("avx512vnni", "Q8_0", "avx512vnni int8"),
        ("avx512", "Q4_K", "avx512 int4"),
        ("avx512", "Q8_0", "avx512 int8"),
        ("avx2", "IQ4_XS", "avx2 int8"),
        ("avx2", "F32", "avx2 fp32"),
    ],
)
def test_a_kernel_is_held_against_its_own_instructions(isa: str, kind: str, peak: str) -> None:
    assert peak_of_blocks(isa, kind) == peak


def test_every_peak_a_kernel_over_blocks_asks_for_exists() -> None:
    known = {p.name for p in peaks()}
    rows = set(native_module().isa_rows()) - {"amx", "amxbf16"}
    assert kernel_isa("BF16") in rows
    assert {peak_of_blocks(isa, kind) for isa in rows for kind in BLOCKS} <= known


def test_the_command_measures_blocks() -> None:
    sizes = "--hidden 256 --intermediate 256 --experts 4 --top-k 2 --rounds 1 --tokens 1,3 --json -"
    methods = "LLAMAFILE:Q4_K,LLAMAFILE:Q4_K:repack,INT8"
    done = ktk("bench", *sizes.split(), "--method", methods, seconds=120)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert [m["method"] for m in result["methods"]] == methods.split(",")
    assert [m["bits_per_weight"] for m in result["methods"][:2]] == [4.5, 4.5]
    assert len(result["cases"]) == 6
    for case in result["cases"]:
        assert case["bound_by"] in ("memory", "compute") and case["fraction"] > 0
