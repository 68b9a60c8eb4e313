"""Rotated experts: every implementation against the exact reference, bit for bit, at the widths of
real models, at widths that are no multiple of the rotation's, and cut into parts for NUMA nodes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest

from ktk._cy.isa import ISA_ROWS
from ktk.experts.activation import Activation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.reference.moe import ExactExperts
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing
from make.implementations import COMPARED, each_of, load, run

# weight_format, group_size, activation_group, rotation: its width, or width and seed
Coding = tuple[str, int, int, int | tuple[int, int]]
CODINGS: list[Coding] = [
    *(("int8", 0, group, width) for width in (64, 256) for group in (64, 128, 256)),
    ("int8", 0, 32, (256, 5)),
    ("int4", 32, 128, 64),
    ("int4", 128, 256, (256, 1)),
    ("nl2", 16, 256, 64),
    ("nl3", 16, 256, 64),
    ("nl4", 16, 256, 64),
    ("nl4", 16, 64, 256),
    ("nl4", 0, 256, (64, 9)),
]


def codings(chosen: list[Coding]) -> pytest.MarkDecorator:
    def name_of(coding: Coding) -> str:
        return "{} g{} a{} r{}".format(*coding).replace(" ", "_")

    return pytest.mark.parametrize("coding", chosen, ids=name_of)


class Case(NamedTuple):
    """Experts, a forward pass over them, and its result."""

    packed: StoredExperts
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]  # hidden, topk_ids, topk_weights
    want: np.ndarray


@functools.lru_cache(maxsize=1)  # the implementations of a case follow each other
def case_of(
    coding: Coding, num_experts: int, hidden: int, intermediate: int, tokens: int, has_bias: bool
) -> Case:
    name, group, activation_group, rotation = coding
    spec = MoESpec(
        num_experts,
        hidden,
        intermediate,
        name,
        group,
        activation_group,
        has_bias=has_bias,
        activation=Activation.swigluoai() if has_bias else Activation(),
        rotation=rotation,  # type: ignore[arg-type]
    )
    packed = pack_all(spec, random_experts(spec, 3))
    x = random_hidden(tokens, hidden, 5)
    inputs = x, *random_routing(tokens, min(2, num_experts), num_experts, 7)
    return Case(packed, inputs, ExactExperts(packed).forward(*inputs))


@each_of(COMPARED)
@codings(CODINGS)
def test_rotated_experts_are_the_exact_model(
    implementation: tuple[str, str], coding: Coding
) -> None:
    check(implementation, coding, 1000, 328)


@each_of(COMPARED)
@codings(CODINGS[3:10:2])
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(7168, 40), (200, 7200)], ids=["k7168", "k7200"]
)
def test_long_rotated_rows_are_the_exact_model(
    implementation: tuple[str, str], coding: Coding, hidden: int, intermediate: int
) -> None:
    check(implementation, coding, hidden, intermediate)


def check(implementation: tuple[str, str], coding: Coding, hidden: int, intermediate: int) -> None:
    """7168: DeepSeek-V3's hidden_size. 40, 200, 7200, 1000, 328: no multiple of 64, and rotated
    with padding. 40 rows of an expert: some on tiles; the first token alone too.
    """
    case = case_of(coding, 2, hidden, intermediate, 40, False)
    runner = load(implementation, case.packed)
    for tokens in (1, 40):
        inputs = (a[:tokens] for a in case.inputs)
        assert_exact(case.want[:tokens], run(runner, *inputs))


@pytest.mark.parametrize("row", [row.name for row in ISA_ROWS])
@codings(CODINGS[::2])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("intermediate", [272, 520, 768])
def test_rotated_experts_cut_for_nodes_give_the_same_bits(
    row: str, coding: Coding, count: int, intermediate: int
) -> None:
    """Of 272 channels the last part of those rotated by 256 has one panel, and of three the first
    has none. 520: the last part ends in padding, which is rotated with its columns. 768: whole
    blocks.
    """
    case = case_of(coding, 5, 208, intermediate, 40, True)
    whole = load(("native", row), case.packed)
    runner = load(("native", row), case.packed, count + 1, count)
    for tokens in (1, 3, 40):
        inputs = [a[:tokens] for a in case.inputs]
        assert_exact(case.want[:tokens], run(whole, *inputs))
        assert_exact(case.want[:tokens], run(runner, *inputs))
    experts = np.arange(40) % 5
    for name, columns in (("gate_up", 208), ("down", intermediate)):
        x = random_hidden(40, columns, 11)
        assert_exact(whole.linear(name, x, experts), runner.linear(name, x, experts))
    assert np.array_equal(runner.packed().data, case.packed.data)
