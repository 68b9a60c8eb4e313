"""ktk.ops.training against the float64 oracle over the dequantised weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16, to_f32
from ktk.experts.lora import MAX_RANK, ExpertLora
from ktk.experts.spec import MoESpec
from ktk.ops.dropout import dropout_factors
from ktk.ops.moe import MoE
from ktk.ops.training import backward, forward
from ktk.reference.gradients import LoraOracle, dropout_factor
from make.cases import assert_exact, pack_all, random_experts
from make.training_cases import ACTIVATIONS, PROJECTIONS, assert_near, random_call, random_lora

SPEC = MoESpec(6, 64, 48, "fp32", has_bias=True)
# Of the forward pass: what rounding activations to int8 costs, and float32 sums. Gradients take
# the forward pass's own z.
FORWARD_BOUNDS = {"fp32": 1e-6, "bf16": 1e-6, "int8": 0.02, "int4": 0.02}
# Kernels multiply gradients with integer panels in 16 bits.
BACKWARD_BOUNDS = {"fp32": 2e-6, "bf16": 2e-6, "int8": 4e-4, "int4": 4e-4}


def check(
    spec: MoESpec, lora: ExpertLora | None, tokens: int, top_k: int, method: str = "auto"
) -> None:
    """Output and all gradients, the latter also with z computed again."""
    moe = MoE(pack_all(spec, random_experts(spec, 3)), method=method)
    hidden, ids, weights, grad = random_call(spec, tokens, top_k, 1)
    if tokens > 2:
        ids[0], ids[1, 0], ids[2, -1] = ids[0, 0], -1, spec.num_experts  # twice, nobody, nobody
    oracle = LoraOracle(
        [expert_weights(moe.packed, e) for e in range(spec.num_experts)], spec, lora
    )
    out, saved = forward(moe, hidden, ids, weights, lora)
    want = oracle.forward(hidden, ids, weights)
    assert_near(want, out, FORWARD_BOUNDS[spec.weight_format])
    found = backward(moe, saved, grad)
    z = None if saved.z is None else saved.z[..., : spec.intermediate_size]  # kernels pad it
    wanted = oracle.backward(hidden, ids, weights, grad, z)
    bound = (
        BACKWARD_BOUNDS[spec.weight_format]
        if saved.z is not None
        else FORWARD_BOUNDS[spec.weight_format]
    )
    assert_near(wanted[0], found.hidden, bound)
    size = float(np.linalg.norm(grad) * np.linalg.norm(want) / len(want[0]) ** 0.5)
    assert_near(wanted[1], found.topk_weights, bound, size)
    assert found.lora.keys() == wanted[2].keys()
    for name, gradient in found.lora.items():
        assert gradient.dtype == np.float32
        assert_near(wanted[2][name], gradient, 5 * bound)  # A x of rank 1 may cancel
    again = backward(moe, dataclasses.replace(saved, z=None), grad)
    assert_exact(found.hidden, again.hidden)
    assert_exact(found.topk_weights, again.topk_weights)
    for name, gradient in found.lora.items():
        assert_exact(gradient, again.lora[name])


@pytest.mark.parametrize("weight_format", FORWARD_BOUNDS)
@pytest.mark.parametrize(("method", "dropout"), [("auto", 0.0), ("auto", 0.3), ("NUMPY", 0.3)])
def test_output_and_gradients_are_those_of_the_oracle(
    weight_format: str, method: str, dropout: float
) -> None:
    """By the kernels, and by what is portable."""
    spec = dataclasses.replace(
        SPEC, weight_format=weight_format, group_size=None, activation_group=None, rotation=None
    )
    check(spec, random_lora(spec, 5, dropout=dropout, seed=7), 9, 3, method)


@pytest.mark.parametrize(("has_gate", "method"), [(True, "auto"), (False, "auto"), (True, "NUMPY")])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_its_gradient(name: str, has_gate: bool, method: str) -> None:
    act = ACTIVATIONS[name]
    if not has_gate:
        act = Activation(act.kind, act.alpha)
    spec = dataclasses.replace(SPEC, activation=act, has_gate=has_gate, has_bias=has_gate)
    check(spec, random_lora(spec, 3), 7, 2, method)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([1, 2, 16, 128]),
    st.sets(st.sampled_from(PROJECTIONS)),
    st.booleans(),
)
def test_any_tokens_ranks_and_targets(
    tokens: int, top_k: int, rank: int, targets: set[str], is_bf16: bool
) -> None:
    check(SPEC, random_lora(SPEC, rank, tuple(targets), is_bf16=is_bf16), tokens, top_k)


def test_without_adapters_the_output_has_the_bits_of_inference() -> None:
    spec = MoESpec(6, 64, 64, "int8")
    moe = MoE(pack_all(spec, random_experts(spec, 3)))
    hidden, ids, weights, _ = random_call(spec, 9, 3, 1)
    want = moe.forward(hidden, ids, weights)
    assert_exact(want, forward(moe, hidden, ids, weights)[0])
    assert_exact(want, forward(moe, hidden, ids, weights, ExpertLora())[0])
    check(spec, None, 9, 3)


def test_experts_without_tokens_get_exactly_zero() -> None:
    moe, lora = MoE(pack_all(SPEC, random_experts(SPEC, 3))), random_lora(SPEC, 4)
    hidden, ids, weights, grad = random_call(SPEC, 5, 2, 1)
    ids[:, 0], ids[:, 1] = 2, [-1, -1, 4, 99, 4]
    found = backward(moe, forward(moe, hidden, ids, weights, lora)[1], grad)
    for gradient in found.lora.values():
        assert [bool(e.any()) for e in gradient] == [False, False, True, False, True, False]
    assert not found.topk_weights[[0, 1, 3], 1].any()


@pytest.mark.parametrize("to", [f32_to_bf16, lambda x: x.astype(np.float16)])
def test_narrow_hidden_states_and_gradients_are_taken_as_they_are(to: Any) -> None:
    import torch

    moe, lora = MoE(pack_all(SPEC, random_experts(SPEC, 3))), random_lora(SPEC, 4)
    hidden, ids, weights, grad = random_call(SPEC, 5, 2, 1)
    narrow = to(hidden)
    wide = to_f32(narrow)
    given = torch.from_numpy(narrow)
    dtype = torch.bfloat16 if narrow.dtype == np.uint16 else torch.float16
    out, saved = forward(moe, given.view(dtype), torch.from_numpy(ids), weights, lora)
    want, want_saved = forward(moe, wide, ids, weights, lora)
    assert out.dtype is dtype
    assert torch.equal(out, torch.from_numpy(want).to(dtype))
    same = torch.from_numpy(to(grad)).view(dtype)
    found, wanted = backward(moe, saved, same), backward(moe, want_saved, same.float().numpy())
    assert_exact(wanted.hidden, found.hidden)
    assert_exact(wanted.lora["down_a"], found.lora["down_a"])


def test_nothing_is_saved_where_nobody_asks_and_no_tokens_are_fine() -> None:
    moe, lora = MoE(pack_all(SPEC, random_experts(SPEC, 3))), random_lora(SPEC, 4)
    hidden, ids, weights, grad = random_call(SPEC, 5, 2, 1)
    assert forward(moe, hidden, ids, weights, lora, is_saved=False)[1].z is None
    for lora_or_none in (lora, None):
        out, saved = forward(moe, hidden[:0], ids[:0], weights[:0], lora_or_none)
        found = backward(moe, saved, grad[:0])
        assert out.shape == found.hidden.shape == (0, 64)
        assert not any(g.any() for g in found.lora.values())
    nobody, saved = forward(moe, hidden, np.full_like(ids, -1), weights, lora)
    assert not nobody.any()
    assert not backward(moe, saved, grad).hidden.any()


def test_dropout_is_that_of_the_reference() -> None:
    for dropout, seed in ((0.1, 0), (0.5, 7), (0.999, 2**32 - 1)):
        lora, pairs = ExpertLora(dropout=dropout, seed=seed), np.array([0, 3, 2**31 + 5])
        for is_down in (False, True):
            got = dropout_factors(seed, dropout, pairs, is_down, 37)
            want = [dropout_factor(lora, pair, is_down, 37) for pair in pairs.tolist()]
            assert_exact(np.stack(want).astype(np.float32), got)


def test_what_does_not_fit_is_named() -> None:
    moe, lora = MoE(pack_all(SPEC, random_experts(SPEC, 3))), random_lora(SPEC, 4)
    hidden, ids, weights, grad = random_call(SPEC, 5, 2, 1)
    saved = forward(moe, hidden, ids, weights, lora)[1]
    with pytest.raises(ValueError, match=r"grad has shape \(4, 64\): must be .*\(5, 64\)"):
        backward(moe, saved, grad[:4])
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"up_a": None}, ValueError, "up_a and up_b: one of them is missing"),
        ({"up_a": lora.up_a[:, :3].copy()}, ValueError, r"up_a has shape \(6, 3, 64\)"),
        ({"up_a": lora.up_a.astype(np.float64)}, TypeError, "up_a is float64"),
        ({"up_a": lora.up_a.swapaxes(0, 1)}, ValueError, "up_a must be C-contiguous"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"scaling": float("nan")}, ValueError, "scaling=nan"),
        ({"seed": -1}, ValueError, "seed=-1"),
    ]
    for changes, kind, text in wrong:
        with pytest.raises(kind, match=text):
            forward(moe, hidden, ids, weights, dataclasses.replace(lora, **changes))
    with pytest.raises(ValueError, match="rank 129: must be in 1..128"):
        forward(moe, hidden, ids, weights, random_lora(SPEC, MAX_RANK + 1, ("up",)))
    with pytest.raises(ValueError, match="these experts have no gate"):
        lora.check(dataclasses.replace(SPEC, has_gate=False))


def test_a_row_with_nan_spoils_its_own_gradients_alone() -> None:
    moe, lora = MoE(pack_all(SPEC, random_experts(SPEC, 3))), random_lora(SPEC, 4)
    hidden, ids, weights, grad = random_call(SPEC, 5, 2, 1)
    bad = hidden.copy()
    bad[3, 5] = np.nan
    out, saved = forward(moe, bad, ids, weights, lora)
    want, want_saved = forward(moe, hidden, ids, weights, lora)
    rest = [0, 1, 2, 4]
    assert np.isnan(out[3]).all()
    found, wanted = (backward(moe, s, grad) for s in (saved, want_saved))
    assert np.isnan(found.hidden[3]).all()
    assert_near(want[rest], out[rest], 1e-6)
    assert_near(wanted.hidden[rest], found.hidden[rest], 1e-6)


def test_bf16_adapters_are_computed_with_as_their_values() -> None:
    moe, narrow = MoE(pack_all(SPEC, random_experts(SPEC, 3))), random_lora(SPEC, 4, is_bf16=True)
    wide = dataclasses.replace(narrow, **{n: bf16_to_f32(a) for n, a in narrow.arrays.items()})
    hidden, ids, weights, _ = random_call(SPEC, 5, 2, 1)
    want, got = (forward(moe, hidden, ids, weights, a)[0] for a in (wide, narrow))
    assert_exact(want, got)


def test_the_bound_sees_a_wrong_element_and_a_wrong_shape() -> None:
    want = np.ones((8, 64))
    assert_near(want, want + 0.5e-6, 1e-6)
    for wrong in (want * (1 + 2e-6), want[:7], np.where(np.eye(8, 64) > 0, np.nan, want)):
        with pytest.raises(AssertionError):
            assert_near(want, wrong, 1e-6)
    one_off = want.copy()
    one_off[2, 3] += 5e-6  # of the norm only 0.2e-6
    with pytest.raises(AssertionError, match="one element"):
        assert_near(want, one_off, 1e-6)


def test_what_another_operator_saved_is_refused() -> None:
    """Else kernels would read behind its end."""
    small, large = (dataclasses.replace(SPEC, intermediate_size=i) for i in (48, 96))
    moes = [MoE(pack_all(spec, random_experts(spec, 3))) for spec in (small, large)]
    hidden, ids, weights, grad = random_call(SPEC, 9, 3, 1)
    for lora, match in ((None, "z has shape"), (random_lora(small, 4), "gate_b has shape")):
        _, saved = forward(moes[0], hidden, ids, weights, lora)
        if saved.z is None:
            pytest.skip("no compiled kernels here: nothing is saved without adapters")
        with pytest.raises(ValueError, match=match):
            backward(moes[1], saved, grad)
