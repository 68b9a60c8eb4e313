"""The compiled backward pass: every format and level against the float64 oracle, and the same bits
whatever the threads, the parts and the order of blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk._cy import native_module
from ktk._cy.isa import ISA_ROWS
from ktk.backends.native import NativeRunner
from ktk.bench.blocks import random_blocks
from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import BLOCKS, GGUF
from ktk.experts.lora import ExpertLora
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu
from ktk.machine.threads import EngineLayout
from ktk.ops.moe import MoE
from ktk.ops.training import backward, forward
from ktk.placement.blocks import kernel_types, repack
from ktk.reference.gradients import LoraOracle
from make.cases import assert_exact, pack_all, random_experts
from make.training_cases import assert_near, random_call, random_lora

if native_module() is None:
    pytest.skip("the compiled extension is not built", allow_module_level=True)

PANELS: list[dict[str, Any]] = [
    {"weight_format": "fp32"},
    {"weight_format": "bf16"},
    {"weight_format": "fp8"},
    {"weight_format": "nvfp4"},
    {"weight_format": "int4_asym", "group_size": 64},
    {"weight_format": "int8", "rotation": 0},
    {"weight_format": "int8", "rotation": 64},
    {"weight_format": "int8", "rotation": 256},
    {"weight_format": "int4", "group_size": 32},
    {"weight_format": "int4", "group_size": 128, "rotation": 64},
    {"weight_format": "nl2", "group_size": 32},
    {"weight_format": "nl3", "group_size": 16},
    {"weight_format": "nl4", "group_size": 16},
    {"weight_format": "nl4", "group_size": 32, "rotation": 256},
    {"weight_format": "nl4", "group_size": 0},
]
# Levels whose own sources decode weights and multiply fp32; the others have those of the one below.
ISAS = tuple(row.name for row in ISA_ROWS if row.name in ("avx2", "avx512", "avx512vnni"))
# Of gradients in which nothing cancels; integer panels are multiplied in 16 bits.
BOUND, INTEGER_BOUND = 2e-6, 4e-4


class Found(NamedTuple):
    out: np.ndarray
    z: np.ndarray
    d_hidden: np.ndarray
    d_weights: np.ndarray
    d_lora: dict[str, np.ndarray]


def run(
    experts: StoredExperts, call: tuple[np.ndarray, ...], lora: ExpertLora | None, **layout: Any
) -> Found:
    """One forward and backward pass of the kernels. layout : isa, num_threads, num_parts."""
    parts = layout.get("num_parts", 1)
    engine = EngineLayout(layout.get("num_threads", 2))
    if parts > 1:
        engine = EngineLayout(layout["num_threads"], parts, (0,) * parts, is_bound=True)
    runner = NativeRunner(experts, layout.get("isa") or str(cpu.best_isa()), engine)
    hidden, ids, weights, grad = call
    out = np.empty_like(hidden)
    z = runner.forward_saved(hidden, ids, weights, lora, out)
    return Found(out, z, *runner.backward(hidden, ids, weights, lora, z, grad))


def call_of(spec: MoESpec, tokens: int, top_k: int) -> tuple[np.ndarray, ...]:
    hidden, ids, weights, grad = random_call(spec, tokens, top_k, 3)
    ids[0], ids[1, 0], ids[2, -1] = ids[0, 0], -1, spec.num_experts  # twice, nobody, nobody
    return hidden, ids, weights, grad


def check(experts: StoredExperts, lora: ExpertLora | None, tokens: int, isa: str) -> None:
    if lacking := cpu.missing(isa, cpu.detect()):
        pytest.skip(f"{isa}: CPU lacks {', '.join(lacking)}")
    spec = experts.spec
    call = call_of(spec, tokens, 2)
    found = run(experts, call, lora, isa=isa)
    oracle = LoraOracle([expert_weights(experts, e) for e in range(spec.num_experts)], spec, lora)
    wanted = oracle.backward(*call, found.z[..., : spec.intermediate_size])
    bound = INTEGER_BOUND if spec.is_packed and spec.format.is_integer else BOUND
    assert_near(wanted[0], found.d_hidden, bound)
    out = oracle.forward(*call[:3])
    size = float(np.linalg.norm(call[3]) * np.linalg.norm(out) / spec.hidden_size**0.5)
    assert_near(wanted[1], found.d_weights, bound, size)
    for name, gradient in found.d_lora.items():
        assert_near(wanted[2][name], gradient, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("coding", PANELS, ids=lambda c: "-".join(map(str, c.values())))
def test_panels_are_differentiated_as_the_oracle_does(coding: dict[str, Any], isa: str) -> None:
    spec = MoESpec(3, 328, 80, **coding, has_bias=True)
    experts = pack_all(spec, random_experts(spec, 1))
    check(experts, random_lora(spec, 5, dropout=0.2, seed=9), 71, isa)  # some have over 64 rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", kernel_types())
def test_blocks_are_differentiated_as_the_oracle_does(kind: str, isa: str) -> None:
    size = 256 if BLOCKS[kind].block == 256 else 96
    act = Activation.relu2()  # random blocks are large: no exp
    spec = MoESpec(3, size, 2 * size, GGUF.name, activation_group=64, activation=act)
    check(random_blocks(spec, (kind,) * 3), random_lora(spec, 4), 9, isa)


def test_types_may_differ() -> None:
    act = Activation.relu2()
    spec = MoESpec(3, 256, 512, GGUF.name, activation_group=64, activation=act)
    check(random_blocks(spec, ("Q4_0", "Q6_K", "Q4_K")), None, 9, str(cpu.best_isa()))


@pytest.mark.parametrize("kind", ["nl4", "Q4_K"])
def test_threads_parts_and_repacking_change_no_bit(kind: str) -> None:
    if kind == "Q4_K":
        spec = MoESpec(5, 256, 512, GGUF.name, activation_group=64)
        experts = random_blocks(spec, (kind,) * 3)
        others = [run_with(repack(experts, 2), 2)]
    else:
        spec = MoESpec(5, 328, 192, kind, has_bias=True)
        experts = pack_all(spec, random_experts(spec, 1))
        others = []
    want = run_with(experts, 1)
    for found in (*others, run_with(experts, 3), run_with(experts, 3)):
        for a, b in zip(want[:4], found[:4], strict=True):
            assert_exact(a, b)  # type: ignore[arg-type]
        for name, gradient in want.d_lora.items():
            assert_exact(gradient, found.d_lora[name])


def run_with(experts: StoredExperts, num_threads: int) -> Found:
    lora = random_lora(experts.spec, 20, dropout=0.1, seed=2)
    found = run(experts, call_of(experts.spec, 90, 3), lora, num_threads=num_threads)
    live = 3 * 90 - 2  # rows behind them are not written
    return found._replace(z=found.z[:live, :, : experts.spec.intermediate_size])


def test_parts_of_numa_nodes_give_the_gradients_of_the_whole() -> None:
    spec = MoESpec(4, 96, 128, "int8", rotation=64, has_bias=True)
    experts = pack_all(spec, random_experts(spec, 1))
    call, lora = call_of(spec, 30, 2), random_lora(spec, 6)
    want = run(experts, call, lora)
    found = run(experts, call, lora, num_threads=2, num_parts=2)
    assert_near(want.d_hidden, found.d_hidden, BOUND)
    assert_near(want.d_weights, found.d_weights, BOUND)
    for name, gradient in want.d_lora.items():
        assert_near(gradient, found.d_lora[name], BOUND)


def test_more_pairs_than_run_at_a_time() -> None:
    spec = MoESpec(4, 32, 32, "fp32")
    packed = pack_all(spec, random_experts(spec, 1))
    call, lora = call_of(spec, 2200, 4), random_lora(spec, 3, dropout=0.3)
    found = run(packed, call, lora)
    moe = MoE(packed, method="NUMPY")
    hidden, ids, weights, grad = call
    out, saved = forward(moe, hidden, ids, weights, lora)
    wanted = backward(moe, saved, grad)
    assert_near(out, found.out, 1e-5)
    assert_near(wanted.hidden, found.d_hidden, 1e-5)
    assert_near(wanted.topk_weights, found.d_weights, 1e-5)
    for name, gradient in wanted.lora.items():
        assert_near(gradient, found.d_lora[name], 1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(3, 20),
    st.sampled_from([1, 16, 17, 128]),
    st.booleans(),
)
def test_sizes_may_be_odd(hidden: int, inner: int, tokens: int, rank: int, has_gate: bool) -> None:
    spec = MoESpec(3, hidden, inner, "fp32", has_gate=has_gate)
    experts = pack_all(spec, random_experts(spec, 1))
    call, lora = call_of(spec, tokens, 2), random_lora(spec, rank, dropout=0.2)
    found = run(experts, call, lora)
    oracle = LoraOracle([expert_weights(experts, e) for e in range(3)], spec, lora)
    wanted = oracle.backward(*call, found.z[..., :inner])
    assert_near(oracle.forward(*call[:3]), found.out, 1e-5)
    assert_near(wanted[0], found.d_hidden, 1e-5)
    for name, gradient in found.d_lora.items():
        assert_near(wanted[2][name], gradient, 1e-4)


def test_nan_of_a_token_stays_in_it_and_in_its_experts_adapters() -> None:
    spec = MoESpec(4, 64, 64, "int8")
    experts = pack_all(spec, random_experts(spec, 1))
    hidden, ids, weights, grad = random_call(spec, 6, 1, 3)
    ids[:, 0] = [0, 1, 0, 2, 2, 1]
    clean = run(experts, (hidden, ids, weights, grad), random_lora(spec, 3))
    grad[3, 5] = np.nan
    found = run(experts, (hidden, ids, weights, grad), random_lora(spec, 3))
    assert np.isnan(found.d_hidden[3]).all() and np.isnan(found.d_weights[3]).all()
    assert_exact(np.delete(clean.d_hidden, 3, 0), np.delete(found.d_hidden, 3, 0))
    assert_exact(np.delete(clean.d_lora["up_b"], 2, 0), np.delete(found.d_lora["up_b"], 2, 0))
