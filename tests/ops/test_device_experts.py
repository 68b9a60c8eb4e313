"""Experts on a device of torch's: their sums are those of the dequantised weights in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.errors import BackendError
from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.spec import MoESpec
from ktk.ops import device_experts
from ktk.ops.device_experts import (
    DeviceExperts,
    activate,
    device_expert_bytes,
    grouped_linear,
)
from ktk.reference.moe import oracle_forward
from make.cases import pack_all, random_experts, random_hidden, random_routing

CPU = torch.device("cpu")
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2e-2}  # of the largest sum


def all_on_device(spec: MoESpec, dtype: torch.dtype) -> tuple[DeviceExperts, list]:
    packed = pack_all(spec, random_experts(spec, 1))
    made = DeviceExperts(spec, spec.num_experts, CPU, dtype)
    weights = [expert_weights(packed, e) for e in range(spec.num_experts)]
    for slot, expert in enumerate(weights):
        made.write(slot, expert)
    return made, weights


@pytest.mark.parametrize("dtype", device_experts.DTYPES)
@pytest.mark.parametrize("width", [96, 61])  # rows of 61 are no multiple of 16 bytes
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
def test_sums_are_those_of_the_float64_oracle(
    dtype: torch.dtype, width: int, has_bias: bool, has_gate: bool
) -> None:
    spec = MoESpec(6, 64, width, "int8", has_gate=has_gate, has_bias=has_bias)
    made, weights = all_on_device(spec, dtype)
    hidden = random_hidden(9, 64, 2)
    ids, scale = random_routing(9, 3, 6, 3)
    ids[2], ids[3, 1], ids[4, :2] = 5, -1, -1  # one expert thrice; one pair and two are not here
    got = made.forward(*map(torch.from_numpy, (hidden, ids, scale)))
    want = oracle_forward(weights, spec, hidden, ids, scale)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - want).max() <= ERROR[dtype] * np.abs(want).max()


@pytest.mark.parametrize(
    "activation",
    [
        Activation.silu(0.4),
        Activation.swigluoai(1.7, 0.5),
        Activation.swigluoai(1.7, 0.5, gate_floor=True),
        Activation.gelu_tanh(),
        Activation.relu2(),
    ],
)
def test_activations_are_those_of_their_definition(activation: Activation) -> None:
    gate, up = random_hidden(50, 8, 4), random_hidden(50, 8, 5)
    for given_gate in (gate, None):
        want = activation.apply(given_gate, up)
        tensor = None if given_gate is None else torch.from_numpy(given_gate)
        got = activate(tensor, torch.from_numpy(up), activation).numpy()
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    size=st.sampled_from([(16, 32), (5, 7), (8, 3)]),
)
def test_grouped_products_are_those_of_each_group(counts: list[int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    weights = torch.randn(len(counts), *size, generator=generator)
    x = torch.randn(sum(counts) + 2, size[1], generator=generator)  # two rows are nobody's
    groups = x.split([*counts, 2])[:-1]
    want = torch.cat([part @ w.T for part, w in zip(groups, weights, strict=True)])
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    got = grouped_linear(x, weights, ends)[: sum(counts)]
    torch.testing.assert_close(got, want)


def test_a_call_cut_into_pieces_has_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MoESpec(4, 64, 64, "int8")
    made, _ = all_on_device(spec, torch.float32)
    hidden = torch.from_numpy(random_hidden(13, 64, 6))
    ids, weights = map(torch.from_numpy, random_routing(13, 2, 4, 7))
    ids[4:8] = -1  # a piece without any
    want = made.forward(hidden, ids, weights)
    monkeypatch.setattr(device_experts, "SUM_BYTES", 4 * 4 * 2 * 64)
    got = made.forward(hidden, ids, weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not got[4:8].any()


def test_bytes_are_those_of_the_slots() -> None:
    for spec in (MoESpec(3, 32, 48, has_bias=True), MoESpec(3, 32, 48, has_gate=False)):
        for dtype in device_experts.DTYPES:
            made = DeviceExperts(spec, 3, CPU, dtype)
            planes = made._planes.values()
            assert sum(p.nbytes for p in planes) == 3 * device_expert_bytes(spec, dtype)


def test_memory_that_is_not_there_is_an_error_with_its_size() -> None:
    spec = MoESpec(1 << 20, 1 << 20, 1 << 18)
    with pytest.raises(BackendError, match=r"no memory for 1048576 experts of \d+ bytes"):
        DeviceExperts(spec, 1 << 20, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"float16.*bfloat16 or float32"):
        DeviceExperts(spec, 1, CPU, torch.float16)
