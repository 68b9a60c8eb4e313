"""Every backend, every ISA row, against the exact reference, bit for bit."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import sys
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk import backends
from ktk._cy import measure_module, native_module
from ktk.experts.activation import Activation
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.layout import PANEL
from ktk.experts.panels import lay_panels
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu
from ktk.machine.threads import EngineLayout
from ktk.reference.moe import ExactExperts
from make.cases import (
    assert_exact,
    pack_all,
    packed_experts,
    random_experts,
    random_hidden,
    random_routing,
)
from make.implementations import (
    COMPARED,
    each_of,
    emulate_or_skip,
    implementations,
    load,
    run,
    sums_on_tiles,
)

# Of formats that share fp8's kernel: test_coded_kernels.py.
ROWS = [f for f in PANELS.values() if f.is_integer or f.scales is None or f.name == "fp8"]
NAMES = [f.name for f in ROWS]
FORMAT_GROUPS = [(f.name, g) for f in ROWS for g in f.group_sizes]
TILE_MIN_ROWS = 9  # gemm.c


class Case(NamedTuple):
    """Experts, a forward pass over them, and its result."""

    packed: StoredExperts
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]  # hidden, topk_ids, topk_weights
    add: np.ndarray | None
    want: np.ndarray


@functools.lru_cache(maxsize=1)  # the implementations of a case follow each other
def exact_case(
    spec: MoESpec,
    num_tokens: int,
    top_k: int,
    seed: int,
    has_add: bool = False,
    bf16_on_tiles: bool = False,
) -> Case:
    packed = packed_experts(spec, seed)
    x = random_hidden(num_tokens, spec.hidden_size, seed + 1)
    routing = random_routing(num_tokens, top_k, spec.num_experts, seed + 2)
    add = random_hidden(num_tokens, spec.hidden_size, seed + 3) if has_add else None
    want = ExactExperts(packed, bf16_on_tiles).forward(x, *routing, None, add)
    return Case(packed, (x, *routing), add, want)


@each_of(COMPARED)
@pytest.mark.parametrize(("name", "group"), FORMAT_GROUPS)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_forward_is_the_exact_model(
    implementation: tuple[str, str], name: str, group: int, tokens: int
) -> None:
    spec = MoESpec(5, 136, 72, name, group)  # K 136, 72: no multiple of any group
    case = exact_case(spec, tokens, 2, tokens, False, sums_on_tiles(implementation, name))
    assert_exact(case.want, run(load(implementation, case.packed), *case.inputs))


@each_of(COMPARED)
@pytest.mark.parametrize(
    ("name", "activation_group"),
    [(f.name, g) for f in ROWS for g in ((32, 64, 128, 256) if f.is_integer else (0,))],
)
@pytest.mark.parametrize(
    ("activation", "has_gate", "has_bias"),
    [
        (Activation.silu(limit=1.0), True, False),
        (Activation.swigluoai(), True, True),
        (Activation.gelu_tanh(), True, False),
        (Activation.relu2(), False, True),
    ],
    ids=["clamped_silu", "swigluoai_bias", "gelu_tanh", "relu2_no_gate_bias"],
)
def test_activations_biases_and_activation_groups(
    implementation: tuple[str, str],
    name: str,
    activation_group: int,
    activation: Activation,
    has_gate: bool,
    has_bias: bool,
) -> None:
    spec = MoESpec(3, 160, 200, name, None, activation_group, has_gate, has_bias, activation)
    case = exact_case(spec, 6, 3, 11, True, sums_on_tiles(implementation, name))
    got = run(load(implementation, case.packed), *case.inputs, None, case.add)
    assert_exact(case.want, got)


@implementations
@pytest.mark.parametrize("top_k", [1, 6])
def test_one_and_all_experts_of_a_token(implementation: tuple[str, str], top_k: int) -> None:
    spec = MoESpec(6, 64, 96, "int4")
    case = exact_case(spec, 3, top_k, 15)
    assert_exact(case.want, run(load(implementation, case.packed), *case.inputs))


@each_of(COMPARED)
@pytest.mark.parametrize(("hidden", "intermediate"), [(7200, 16), (16, 7200)])
def test_long_reductions_with_few_rows_per_expert(
    implementation: tuple[str, str], hidden: int, intermediate: int
) -> None:
    spec = MoESpec(2, hidden, intermediate, "int4")
    packed = packed_experts(spec, 18)
    runner = load(implementation, packed)
    x = random_hidden(7, hidden, 19)
    ids = np.array([[0], [0], [1], [1], [1], [0], [1]])  # 3 and 4 rows
    weights = np.ones((7, 1), np.float32)
    assert_exact(ExactExperts(packed).forward(x, ids, weights), run(runner, x, ids, weights))


@each_of(COMPARED)
@pytest.mark.parametrize(
    ("name", "group", "activation_group"),
    [(f, g, a) for f, g in FORMAT_GROUPS if PANELS[f].is_integer for a in (32, 64, 128, 256)],
)
def test_rows_around_tile_edges(
    implementation: tuple[str, str], name: str, group: int, activation_group: int
) -> None:
    """One expert's rows in blocks of 64; K 416 and 224, no multiple of 64, 128 or 256 unless
    rotation pads it; 14 and 26 panels, 7 an odd part.
    """
    spec = MoESpec(1, 416, 210, name, group, activation_group, rotation=0)
    case = exact_case(spec, 113, 1, seed=81)
    runner = load(implementation, case.packed)
    for rows in (8, 9, 16, 17, 31, 33, 47, 64, 113):
        assert_exact(case.want[:rows], run(runner, *(a[:rows] for a in case.inputs)))


@each_of(COMPARED)
def test_a_matrix_smaller_than_a_tile(implementation: tuple[str, str]) -> None:
    """K 32 and 96 are a single group whatever its size; 1 and 3 panels."""
    for name, group, activation_group in (("int8", 0, 128), ("int4", 128, 128), ("int4", 0, 64)):
        for hidden, intermediate in ((20, 33), (96, 7)):
            spec = MoESpec(1, hidden, intermediate, name, group, activation_group, has_gate=False)
            case = exact_case(spec, 19, 1, 83)
            assert_exact(case.want, run(load(implementation, case.packed), *case.inputs))


@each_of(COMPARED)
@pytest.mark.parametrize("group", PANELS["nl4"].group_sizes)
@pytest.mark.parametrize("name", ["nl2", "nl3", "nl4"])
@pytest.mark.parametrize("sign", [1, -1])
def test_levels_of_the_largest_sums_are_exact(
    implementation: tuple[str, str], name: str, group: int, sign: int
) -> None:
    """Every weight the largest level times the largest multiplier, of either sign, every
    activation 127 or -127: where 16-bit sums would overflow if they could.
    """
    fmt = PANELS[name]
    spec = MoESpec(2, 544, 16, name, group, 256, has_gate=False, rotation=0)
    packed = pack_all(spec, random_experts(spec, 87))
    extremes = (int(np.argmin(fmt.levels)), int(np.argmax(fmt.levels)))
    largest = int(np.argmax(sign * np.array(fmt.multipliers)))
    layout = spec.layout.gate_up
    for e, level in enumerate(extremes):
        panels = spec.layout.panels(packed.data[e], "up")
        codes = np.full((layout.num_panels * PANEL, layout.padded_in), level, np.uint8)
        panels[:, layout.scale_bytes :] = lay_panels(
            codes,
            np.ones((len(codes), 1), np.float32),
            layout,
            np.zeros((len(codes), 34), np.uint8),
        )[:, layout.scale_bytes :]
        panels[:, PANEL * 4 : layout.scale_bytes] = largest * 17
    x = np.repeat(np.array([[1], [-1], [1]], np.float32), 544, axis=1)
    x[2, ::2] = -1
    ids = np.array([0, 0, 0, 1, 1, 1])
    x = np.concatenate([x, x])
    got = load(implementation, packed).linear("gate_up", x, ids)
    exact = ExactExperts(packed)
    for row, e in enumerate(ids):
        assert_exact(exact.linear(int(e), "up", x[row : row + 1]), got[row : row + 1])


def test_the_extension_is_built_where_it_can_be() -> None:
    """A build that failed would skip every native test; CI must not stay green then."""
    can = platform.machine() in ("x86_64", "amd64") and shutil.which("cc") and shutil.which("gcc")
    if can and os.environ.get("CC", "cc") in ("cc", "gcc"):
        assert native_module() is not None
        assert measure_module() is not None
        if sys.platform == "linux":
            assert importlib.util.find_spec("ktk._cy.tile_emulator") is not None


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 200),
    intermediate=st.integers(1, 200),
    experts=st.integers(1, 9),
    tokens=st.integers(1, 40),
    data=st.data(),
)
def test_any_shape_runs_exactly(
    hidden: int, intermediate: int, experts: int, tokens: int, data: st.DataObject
) -> None:
    name, group = data.draw(st.sampled_from(FORMAT_GROUPS))
    top_k = data.draw(st.integers(1, experts))
    seed = data.draw(st.integers(0, 2**31))
    spec = MoESpec(experts, hidden, intermediate, name, group)
    packed = pack_all(spec, random_experts(spec, seed))
    x = random_hidden(tokens, hidden, seed)
    ids, weights = random_routing(tokens, top_k, experts, seed)
    skip = np.random.default_rng(seed).random(experts) < 0.2
    for backend in backends.backends().values():
        if backend.why_not(spec) is None and backend.name not in ("NUMPY", "NUMBA"):
            want = ExactExperts(packed, backend.name == "AMXBF16").forward(x, ids, weights, skip)
            assert_exact(want, run(backend.load(packed, EngineLayout(2)), x, ids, weights, skip))


@implementations
@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_bit_identical_in_any_batch(implementation: tuple[str, str], name: str) -> None:
    spec = MoESpec(8, 96, 64, name)
    packed = packed_experts(spec, 21)
    x = random_hidden(70, 96, 22)
    ids, weights = random_routing(70, 3, 8, 23)
    ids[10:] = ids[10]  # one expert with more rows than a row block
    runner = load(implementation, packed)
    together = run(runner, x, ids, weights)
    for t in (0, 5, 10, 69):
        assert_exact(
            together[t : t + 1], run(runner, x[t : t + 1], ids[t : t + 1], weights[t : t + 1])
        )
    order = np.random.default_rng(24).permutation(70)
    assert_exact(together[order], run(runner, x[order], ids[order], weights[order]))


@each_of(COMPARED)
@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_a_bit(implementation: tuple[str, str], name: str) -> None:
    spec = MoESpec(6, 128, 272, name)
    packed = packed_experts(spec, 31)
    x = random_hidden(37, 128, 32)
    ids, weights = random_routing(37, 2, 6, 33)
    want = run(load(implementation, packed, 1), x, ids, weights)
    for threads in (2, 3, 8):
        assert_exact(want, run(load(implementation, packed, threads), x, ids, weights))


@pytest.mark.parametrize("name", ["nl2", "nl3", "nl4", "int4", "int8"])
def test_amx_multiplies_on_tiles_where_rows_are_enough(name: str) -> None:
    if native_module() is None:
        pytest.skip("the compiled extension is not built")
    emulator = emulate_or_skip()
    if lacking := cpu.missing("avx512vnni", cpu.detect()):
        pytest.skip(f"amx: CPU lacks {', '.join(lacking)}")
    spec = MoESpec(1, 256, 128, name, None, 128)
    packed = pack_all(spec, random_experts(spec, 85))
    for rows, uses_tiles in ((TILE_MIN_ROWS - 1, False), (TILE_MIN_ROWS, True), (64, True)):
        x = random_hidden(rows, 256, 86)
        ids, weights = np.zeros((rows, 1), np.int64), np.ones((rows, 1), np.float32)
        emulator.reset_counts()
        run(load(("native", "amx"), packed), x, ids, weights)
        counts = emulator.counts()
        # gate and up: 16 panels over 256 k; down: 16 over 128; 64 k a product, or a group of 32
        depth = 32 if name == "int4" else 64
        products = 16 * (256 + 128) // depth * -(-rows // 16) if uses_tiles else 0
        assert counts["tdpbssd"] == products
        assert counts["tilerelease"] in (0, counts["ldtilecfg"])  # a CPU may run it itself
        if rows == 64:  # four products for two tiles of A and two of B
            assert counts["tileloadd"] == products


def test_chunks_of_tokens_do_not_change_a_bit() -> None:
    """More pairs than MAX_PAIRS of moe.c: 8192 / 40 slots = 204 tokens a chunk."""
    spec = MoESpec(2, 64, 48, "int4", 32)
    packed = pack_all(spec, random_experts(spec, 35))
    x, add = random_hidden(420, 64, 36), random_hidden(420, 64, 38)
    ids = np.random.default_rng(37).integers(0, 2, (420, 40))
    weights = np.full(ids.shape, 1 / 40, np.float32)
    runner = load(("native", "avx2"), packed)
    together = run(runner, x, ids, weights, None, add)
    for t in (0, 203, 204, 407, 408, 419):
        one = slice(t, t + 1)
        assert_exact(together[one], run(runner, x[one], ids[one], weights[one], None, add[one]))


@implementations
def test_ids_outside_and_skipped_add_exactly_zero(implementation: tuple[str, str]) -> None:
    spec = MoESpec(4, 64, 64, "int8")
    packed = packed_experts(spec, 41)
    x = random_hidden(4, 64, 42)
    ids = np.array([[0, 1], [-1, 4], [2**62, -(2**63)], [3, 3]])
    weights = np.array([[0.5, 0.5], [9, 9], [np.nan, 1], [1, 1]], np.float32)
    skip = np.array([False, True, False, False])
    got = run(load(implementation, packed), x, ids, weights, skip)
    alone = run(load(implementation, packed), x[:1], np.array([[0]]), weights[:1, :1])
    assert_exact(alone, got[:1])
    assert_exact(np.zeros((2, 64), np.float32), got[1:3])
    assert got[3].any()


@implementations
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "activation", [Activation(), Activation.swigluoai(gate_floor=True)], ids=["silu", "clamped"]
)
def test_non_finite_hidden_stays_in_its_row(
    implementation: tuple[str, str], name: str, bad: float, activation: Activation
) -> None:
    spec = MoESpec(3, 160, 64, name, activation=activation)
    packed = packed_experts(spec, 51)
    x = random_hidden(9, 160, 52)
    ids, weights = random_routing(9, 3, 3, 53)
    clean = run(load(implementation, packed), x, ids, weights)
    x[4, 100] = bad
    got = run(load(implementation, packed), x, ids, weights)
    assert not np.isfinite(got[4]).any()
    assert_exact(np.delete(clean, 4, 0), np.delete(got, 4, 0))


@implementations
@pytest.mark.parametrize("dtype", ["float16", "bf16"])
def test_half_precision_goes_in_exactly_and_comes_out_rounded_once(
    implementation: tuple[str, str], dtype: str
) -> None:
    spec = MoESpec(3, 100, 50, "int8")
    packed = packed_experts(spec, 61)
    x32 = random_hidden(11, 100, 62)
    ids, weights = random_routing(11, 2, 3, 63)
    if dtype == "bf16":
        x = f32_to_bf16(x32)
        wide = (x.astype(np.uint32) << 16).view(np.float32)
    else:
        x = x32.astype(np.float16)
        wide = x.astype(np.float32)
    got = run(load(implementation, packed), x, ids, weights)
    want = ExactExperts(packed).forward(wide, ids, weights)
    assert_exact(f32_to_bf16(want) if dtype == "bf16" else want.astype(np.float16), got)


@implementations
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no_gate"])
def test_linear_is_one_projection(
    implementation: tuple[str, str], name: str, has_gate: bool
) -> None:
    spec = MoESpec(4, 70, 150, name, has_gate=has_gate)
    packed = packed_experts(spec, 71)
    runner = load(implementation, packed)
    exact = ExactExperts(packed, sums_on_tiles(implementation, name))
    ids = np.array([3, 0, 0, 2, 3, 3, 0])
    for projection, names, width in (
        ("gate_up", ("gate", "up") if has_gate else ("up",), 70),
        ("down", ("down",), 150),
    ):
        x = random_hidden(7, width, 72)
        got = runner.linear(projection, x, ids)
        for row, e in enumerate(ids):
            want = np.concatenate(
                [exact.linear(int(e), n, x[row : row + 1]) for n in names], axis=1
            )
            assert_exact(want, got[row : row + 1])
