"""Codes of checkpoints, multiplied as they are: every kernel against the exact model, bit for bit,
and against float64 where a sum is long.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from ktk.experts.formats import PANELS
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.reference.moe import ExactExperts
from make.cases import assert_exact, pack_all, random_experts, random_hidden
from make.implementations import COMPARED, each_of, load, run

CODED = [f for f in PANELS.values() if not f.is_integer and f.scales is not None]
GROUPS = [(f.name, g) for f in CODED for g in f.group_sizes]
FIRST = [(f.name, f.default_group) for f in CODED]


@functools.lru_cache(maxsize=1)  # the implementations that run a case follow each other
def random_codes(spec: MoESpec, seed: int) -> StoredExperts:
    """Experts whose codes are any finite ones, with the scales of random weights."""
    packed, rng = pack_all(spec, random_experts(spec, seed)), np.random.default_rng(seed)
    for name in spec.layout.projections:
        layout = spec.layout.matrix(name)
        for expert in range(spec.num_experts):
            codes = packed.matrices[name].data[expert][:, layout.scale_bytes :]
            drawn = rng.integers(0, 256, codes.shape, dtype=np.uint8)
            if spec.format.codes.dtype == "e5m2":
                drawn[(drawn & 0x7C) == 0x7C] = 0  # inf and NaN
            elif spec.format.codes.dtype == "e4m3":
                drawn[(drawn & 0x7F) == 0x7F] = 0
            codes[:] = drawn
    return packed


@each_of(COMPARED)
@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_any_code_is_multiplied_exactly(
    implementation: tuple[str, str], name: str, group: int
) -> None:
    """Up to four rows, which are multiplied as they are decoded, five panels; then tiles of four,
    two and one, over two pieces of k, the last group cut off.
    """
    spec = MoESpec(1, 168, 72, name, group, has_gate=False)
    packed = random_codes(spec, 3)
    runner, exact = load(implementation, packed), ExactExperts(packed)
    for projection, of, width in (("gate_up", "up", 168), ("down", "down", 72)):
        x = random_hidden(7, width, 4)
        want = exact.linear(0, of, x)
        for rows in (1, 2, 3, 4, 7):
            ids = np.zeros(rows, np.int64)
            assert_exact(want[:rows], runner.linear(projection, x[:rows], ids))


@each_of(COMPARED[:1])
@pytest.mark.parametrize(("name", "group"), FIRST)
def test_k_above_7168(implementation: tuple[str, str], name: str, group: int) -> None:
    spec = MoESpec(1, 7424, 16, name, group, has_gate=False)
    packed = pack_all(spec, random_experts(spec, 5))
    weights = ExactExperts(packed).dequantised(0).up.astype(np.float64)
    runner = load(implementation, packed)
    for rows in (1, 2, 3):
        x = random_hidden(rows, 7424, 6)
        want = x.astype(np.float64) @ weights.T
        got = runner.linear("gate_up", x, np.zeros(rows, np.int64))
        size = np.abs(x).astype(np.float64) @ np.abs(weights).T
        bound = 1e-5 if spec.format.is_fine else 2e-6
        assert (np.abs(got - want) <= bound * size).all()
        assert np.abs(weights[:, 7168:]).max() > 0  # what a shorter sum would leave out


@each_of(COMPARED[:1])
@pytest.mark.parametrize(("name", "group"), FIRST)
def test_a_layer_of_them_gives_the_exact_models_bits(
    implementation: tuple[str, str], name: str, group: int
) -> None:
    spec = MoESpec(2, 72, 40, name, group, has_bias=True)
    packed = pack_all(spec, random_experts(spec, 7))
    x = random_hidden(5, 72, 8)
    ids = np.array([[0, 1], [0, -1], [1, 0], [0, 1], [1, -1]])
    weights = np.full(ids.shape, 0.5, np.float32)
    got = run(load(implementation, packed), x, ids, weights)
    assert_exact(ExactExperts(packed).forward(x, ids, weights), got)
