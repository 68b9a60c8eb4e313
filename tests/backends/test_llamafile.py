"""LLAMAFILE: every type, every ISA, against gguf's own dequantisation and the exact arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ktk
from ktk import backends
from ktk._cy import native_module
from ktk._cy.isa import ISA_ROWS
from ktk.backends import Operands
from ktk.backends.native import NativeRunner
from ktk.bench.blocks import error_bound, random_blocks, random_matrix
from ktk.experts.activation import Activation
from ktk.experts.dequantise import dequantise, expert_weights
from ktk.experts.formats import BLOCKS, GGUF
from ktk.experts.formats.decode import IK_TYPES
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.machine import cpu
from ktk.machine.threads import EngineLayout
from ktk.placement.blocks import kernel_types, repack
from ktk.reference.moe import ExactExperts, oracle_forward
from make.block_cases import ExactBlocks, unpack
from make.cases import assert_exact, random_hidden, random_routing

if native_module() is None:
    pytest.skip("the compiled extension is not built", allow_module_level=True)

TYPES = kernel_types()
ISAS = tuple(row.name for row in ISA_ROWS)
FLOATS = ("F32", "F16", "BF16")


def load(experts: StoredExperts, isa: str, num_threads: int = 2) -> NativeRunner:
    if lacking := cpu.missing(isa, cpu.detect()):
        pytest.skip(f"{isa}: CPU lacks {', '.join(lacking)}")
    return NativeRunner(experts, isa, EngineLayout(num_threads))


def run(runner: NativeRunner, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = np.full_like(x, 7)
    runner.forward(Operands(x, ids, weights, None, out))
    return out


def width(kind: str) -> int:
    """The least in_features that has every tail: blocks of 256 once,
    else no multiple of any activation group.
    """
    return 256 if BLOCKS[kind].block == 256 else 96


def spec_for(*kinds: str, num_experts: int = 3, group: int = 64, **fields: Any) -> MoESpec:
    size = max(map(width, kinds))
    return MoESpec(num_experts, size, 2 * size, GGUF.name, activation_group=group, **fields)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
def test_unpacked_blocks_are_what_gguf_dequantises(kind: str, isa: str) -> None:
    if lacking := cpu.missing(isa, cpu.detect()):
        pytest.skip(f"{isa}: CPU lacks {', '.join(lacking)}")
    matrix = random_matrix(kind, 1, 32, 2 * width(kind), seed=7)
    want = dequantise(matrix, 0).astype(np.float64)
    codes, scales, minima = unpack(matrix, 0, isa)
    if scales is None or minima is None:
        assert_exact(want.astype(np.float32), np.ascontiguousarray(codes))
        return
    fine = codes.shape[1] // scales.shape[1]
    got = codes * np.repeat(scales, fine, 1).astype(np.float64) + np.repeat(minima, fine, 1)
    # gguf rounds its products to float32; what is unpacked is exact.
    assert np.abs(got - want).max() <= 2**-22 * np.abs(want).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_forward_is_the_exact_model(kind: str, isa: str, tokens: int) -> None:
    spec = spec_for(kind, group=128 if tokens == 3 else 64)
    experts = random_blocks(spec, (kind,) * 3, seed=tokens)
    runner = load(experts, isa)
    x = random_hidden(tokens, spec.hidden_size, tokens)
    ids, weights = random_routing(tokens, 2, 3, tokens)
    want = ExactBlocks(experts, isa).forward(x, ids, weights)
    got = run(runner, x, ids, weights)
    if kind == "BF16" and isa in ("avx512bf16", "amx", "amxbf16"):
        assert np.abs(got - want).mean() <= error_bound(kind, 64) * np.abs(want).mean()
    else:
        assert_exact(want, got)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", TYPES)
def test_batch_threads_and_repacking_change_no_bit(kind: str, isa: str) -> None:
    spec = spec_for(kind)
    experts = random_blocks(spec, (kind,) * 3)
    x = random_hidden(301, spec.hidden_size, 1)  # more rows of an expert than one task takes
    ids, weights = random_routing(301, 2, 3, 1)
    want = run(load(experts, isa, 1), x, ids, weights)
    for runner in (load(experts, isa, 3), load(repack(experts, 2), isa)):
        assert_exact(want, run(runner, x, ids, weights))
        for tokens in (1, 2, 4, 5, 12):
            few = slice(40, 40 + tokens)
            assert_exact(want[few], run(runner, x[few], ids[few], weights[few]))


# Of the others test_ik_types.py tells.
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in IK_TYPES])
def test_error_against_float64_is_that_of_activations(kind: str) -> None:
    spec = MoESpec(4, 512, 768, GGUF.name, activation_group=64)
    experts = random_blocks(spec, (kind,) * 3)
    x = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    ids, weights = random_routing(8, 2, 4, 0)
    with np.errstate(over="ignore"):
        want = oracle_forward([expert_weights(experts, e) for e in range(4)], spec, x, ids, weights)
    got = ktk.MoE(experts)(x, ids, weights)
    assert np.abs(got - want).mean() <= error_bound(kind, 64) * np.abs(want).mean()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_types_may_differ_and_sizes_be_odd(data: st.DataObject) -> None:
    blocks_of_32 = [k for k in TYPES if BLOCKS[k].block == 32] + list(FLOATS)
    kinds = tuple(data.draw(st.sampled_from(blocks_of_32)) for _ in range(3))
    is_float = all(kind in FLOATS for kind in kinds)
    step = 1 if is_float else 32
    hidden, inner = (data.draw(st.integers(1, 7 if step == 32 else 150)) * step for _ in range(2))
    spec = MoESpec(
        3,
        hidden,
        inner,
        GGUF.name,
        activation_group=data.draw(st.sampled_from((32, 64, 128))),
        has_gate=data.draw(st.booleans()),
        has_bias=data.draw(st.booleans()),
        activation=data.draw(
            st.sampled_from((Activation(), Activation.swigluoai(), Activation.relu2()))
        ),
    )
    experts = random_blocks(spec, kinds, seed=hidden * inner)
    tokens = data.draw(st.integers(0, 20))
    x = random_hidden(tokens, hidden, 3)
    ids = np.random.default_rng(tokens).integers(-1, 4, (tokens, 2))
    weights = np.full((tokens, 2), 0.5, np.float32)
    got = ktk.MoE(experts)(x, ids, weights)
    isa = cpu.best_isa()
    assert isa is not None
    with np.errstate(over="ignore"):
        if is_float or "BF16" in kinds:  # no exact model of odd sizes, nor of VDPBF16PS
            weights_of = [expert_weights(experts, e) for e in range(3)]
            want = oracle_forward(weights_of, spec, x, ids, weights)
            # relu2 multiplies three errors, and its output may be small where they are not
            bound = 0.05 if is_float else 0.3
            assert np.abs(got - want).max(initial=0) <= bound * np.abs(want).max(initial=1e-30)
        else:
            assert_exact(ExactBlocks(experts, isa).forward(x, ids, weights), got)
    assert_exact(got, ktk.MoE(experts, repack=True)(x, ids, weights))


def test_nan_stays_in_its_row() -> None:
    for kinds in (("Q4_0",) * 3, ("Q4_0", "F32", "Q8_0"), ("F16", "Q4_0", "BF16")):
        experts = random_blocks(spec_for(*kinds), kinds)
        moe = ktk.MoE(experts)
        x = random_hidden(3, moe.spec.hidden_size, 0)
        ids, weights = random_routing(3, 2, 3, 0)
        clean = moe(x, ids, weights)
        x[1, 5] = np.inf
        got = moe(x, ids, weights)
        assert np.isnan(got[1]).all()
        assert_exact(clean[[0, 2]], got[[0, 2]])


def test_order_runs_another_expert() -> None:
    experts = random_blocks(spec_for("Q4_0", has_bias=True), ("Q4_0",) * 3)
    order = np.array([2, 0, 2])
    x = random_hidden(5, experts.spec.hidden_size, 0)
    ids, weights = random_routing(5, 2, 3, 0)
    want = ktk.MoE(experts)(x, order[ids], weights)
    assert_exact(want, ktk.MoE(dataclasses.replace(experts, order=order))(x, ids, weights))
    kept = dataclasses.replace(experts, order=order)
    assert_exact(expert_weights(experts, 2).up, expert_weights(kept, 0).up)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (np.array([0, 1, 3]), "from 0 to 3"),
        (np.array([-2, 1, 2]), "from -2 to 2"),
        (np.array([0]), r"\(1,\)"),
        (np.arange(3, dtype=np.int32), "int32"),
    ],
)
def test_an_order_beyond_the_experts_is_refused(order: np.ndarray, text: str) -> None:
    experts = random_blocks(spec_for("Q4_0"), ("Q4_0",) * 3)
    with pytest.raises(ValueError, match=f"order.*{text}"):
        dataclasses.replace(experts, order=order)


def test_an_order_may_lie_backwards_in_memory() -> None:
    experts = random_blocks(spec_for("Q4_0"), ("Q4_0",) * 3)
    x = random_hidden(4, experts.spec.hidden_size, 0)
    ids, weights = random_routing(4, 2, 3, 0)
    backwards = dataclasses.replace(experts, order=np.arange(3)[::-1])
    assert_exact(ktk.MoE(experts)(x, 2 - ids, weights), ktk.MoE(backwards)(x, ids, weights))


def test_repacked_blocks_of_another_shape_are_refused() -> None:
    whole = repack(random_blocks(spec_for("Q4_0"), ("Q4_0",) * 3), 1)
    few = dataclasses.replace(whole.up, data=whole.up.data[:1].copy())
    with pytest.raises(ValueError, match=r"up is \(1, 192, 96\)"):
        dataclasses.replace(whole, up=few)
    with pytest.raises(ValueError, match="must have 54"):
        dataclasses.replace(whole.up, data=whole.up.data[:, :, :-1].copy())


def test_repacked_blocks_are_not_quantised_anew() -> None:
    repacked = repack(random_blocks(spec_for("Q4_0"), ("Q4_0",) * 3), 1)
    with pytest.raises(ValueError, match="repacked"):
        ktk.MoE(repacked, method="INT8")


@pytest.mark.parametrize("num_parts", [2, 3])
def test_parts_change_no_bit(num_parts: int) -> None:
    spec = MoESpec(3, 288, 416, GGUF.name, activation_group=32, has_bias=True)
    experts = random_blocks(spec, ("Q8_0", "F16", "Q4_0"))
    x = random_hidden(70, 288, 0)
    ids, weights = random_routing(70, 2, 3, 0)
    want = run(load(experts, "avx2", 1), x, ids, weights)
    layout = EngineLayout(num_parts, num_parts, (0,) * num_parts, (), is_bound=True)
    for blocks in (experts, repack(experts, 2)):
        assert_exact(want, run(NativeRunner(blocks, "avx2", layout), x, ids, weights))


def test_linear_is_one_projection() -> None:
    spec = MoESpec(3, 64, 96, GGUF.name, activation_group=32)
    experts = random_blocks(spec, ("F32", "F16", "F32"))
    moe = ktk.MoE(experts)
    x, ids = random_hidden(9, 64, 0), np.arange(9) % 3
    got = moe.linear("gate_up", x, ids)
    for row, e in enumerate(ids):
        w = expert_weights(experts, int(e))
        assert w.gate is not None
        want = np.concatenate([w.gate @ x[row], w.up @ x[row]])
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-6)
    h = random_hidden(9, 96, 1)
    want = np.stack([expert_weights(experts, int(e)).down @ h[i] for i, e in enumerate(ids)])
    np.testing.assert_allclose(moe.linear("down", h, ids), want, rtol=1e-4, atol=1e-6)


def test_a_method_for_packed_weights_quantises_anew() -> None:
    experts = random_blocks(spec_for("Q8_0", has_bias=True), ("Q8_0",) * 3)
    x = random_hidden(4, experts.spec.hidden_size, 0)
    ids, weights = random_routing(4, 2, 3, 0)
    want = ktk.MoE(experts)(x, ids, weights)
    for method, bound in (("INT8", 0.05), ("BF16", 0.02), ("INT4", 0.3)):
        moe = ktk.MoE(experts, method=method)
        assert moe.spec.weight_format == method.lower()
        assert moe.packed.is_packed
        got = moe(x, ids, weights)
        if method != "BF16":  # integers are exact
            assert_exact(ExactExperts(moe.packed).forward(x, ids, weights), got)
        assert np.abs(got - want).mean() <= bound * np.abs(want).mean()
    assert ktk.MoE(experts, method="AVX2").spec.weight_format == "int8"
    few_bits = random_blocks(spec_for("Q4_0"), ("Q4_0",) * 3)
    assert ktk.MoE(few_bits, method="NUMBA").spec.weight_format == "int4"


def test_type_without_kernel_runs_as_floats(caplog: pytest.LogCaptureFixture) -> None:
    experts = random_blocks(MoESpec(2, 64, 64, GGUF.name), ("Q4_0",) * 3)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 120, (2, 64, 36), dtype=np.uint8)
    odd = dataclasses.replace(experts, down=StoredMatrix.of_rows("NVFP4", 64, raw))
    x = random_hidden(3, 64, 0)
    ids, weights = random_routing(3, 1, 2, 0)
    got = ktk.MoE(odd)(x, ids, weights)
    want = oracle_forward([expert_weights(odd, e) for e in range(2)], odd.spec, x, ids, weights)
    assert np.abs(got - want).mean() <= 0.05 * np.abs(want).mean()
    with pytest.raises(ValueError, match="decodes Q9_X"):
        StoredMatrix.of_rows("Q9_X", 64, raw)
    with pytest.raises(ValueError, match="have 35 bytes: must have 36"):
        StoredMatrix.of_rows("NVFP4", 64, raw[:, :, :-1].copy())


def test_backends_for_packed_weights_refuse_blocks_and_the_other_way_round() -> None:
    packed, blocks = MoESpec(2, 64, 64), MoESpec(2, 64, 64, GGUF.name)
    for name, backend in backends.backends().items():
        spec = packed if name == "LLAMAFILE" else blocks
        assert backend.why_not(spec) is not None, name
    with pytest.raises(ValueError, match="repack"):
        ktk.MoE(ktk.MoE.from_weights(*np.zeros((3, 1, 32, 32), np.float32)).packed, repack=True)


def test_repack_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = random_blocks(spec_for("Q4_0"), ("Q4_0",) * 3)
    assert not ktk.MoE(experts).packed.up.is_repacked
    monkeypatch.setenv("KTK_REPACK", "1")
    assert ktk.MoE(experts).packed.up.is_repacked
    assert not ktk.MoE(experts, repack=False).packed.up.is_repacked


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    experts = random_blocks(MoESpec(2, 64, 64, GGUF.name), ("Q4_0",) * 3)
    with pytest.raises(ValueError, match="must have 36"):
        dataclasses.replace(experts.up, data=experts.up.data[:, :, :-1].copy())
