"""A recipe for a budget of bits: every coding of every matrix measured, then the best set of them.

A coding's loss is the change of its layer's output (``ktk.convert.measure``) by what the model
makes of such a change: the KL divergence of its next tokens, in nats, where noise was added to that
layer's output alone. How a set is found, ``ktk.convert.allocate`` says. In a packed directory the
matrices of a layer have one coding and are chosen together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ktk.convert.allocate import allocate
from ktk.convert.exact import run_layer
from ktk.convert.measure import measure_layer
from ktk.convert.recipe import Coding, Recipe, projections_of
from ktk.convert.sources import Calibration, Source, open_source
from ktk.experts.spec import MoESpec
from ktk.machine.cpu import num_physical_cores
from ktk.paths import user_path
from ktk.quantise.feedback import LayerInputs

# What is tried where nobody names others, fewest bits first; of GGUF types those that rows fit.
PACKED = ("nl2", "nl3", "nl4", "int8")
BLOCKS = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Chosen:
    """The coding of some matrices of one layer that are coded alike. projections : their names.

    loss : KL divergence a token that is expected of it, in nats. num_bytes : of all experts.
    """

    layer: int
    projections: tuple[str, ...]
    coding: Coding
    loss: float
    num_bytes: int


@dataclass(frozen=True)
class Choice:
    """What was chosen. bits_per_weight : of the experts. loss : the sum of the rows'."""

    rows: tuple[Chosen, ...]
    bits_per_weight: float
    loss: float

    @property
    def recipe(self) -> Recipe:
        codings = {(r.layer, name): r.coding for r in self.rows for name in r.projections}
        return Recipe.of_experts(codings)

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "layer": r.layer,
                "projections": list(r.projections),
                "format": str(r.coding),
                "loss": r.loss,
                "bytes": r.num_bytes,
            }
            for r in self.rows
        ]
        return {"bits_per_weight": self.bits_per_weight, "loss": self.loss, "rows": rows}


def choose(
    input_path: str | os.PathLike[str],
    bits: float,
    calibration: Calibration,
    *,
    to_gguf: bool = False,
    among: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """The codings of least loss whose experts take at most ``bits`` a weight on average.

    to_gguf : of a GGUF file, each matrix its own; else of a packed directory, each layer one.
    among : codings to choose from, by default PACKED or BLOCKS. progress : (done, all).
    Raises CheckpointError for a bad input, ValueError for codings that do not fit and for fewer
    bits than the smallest take.
    """
    tried = [Coding.parse(name) for name in among or (BLOCKS if to_gguf else PACKED)]
    for coding in tried:
        if coding.format.is_packed == to_gguf:
            where = "a GGUF file" if to_gguf else "a packed directory"
            raise ValueError(f"among {coding}: is no format of {where}")
    with open_source(user_path(input_path), None) as source:
        specs = {layer: MoESpec(**source.spec_fields(layer)) for layer in source.layers}
        options = [
            _options(layer, spec, tried, to_gguf, among is None) for layer, spec in specs.items()
        ]
        weights = sum(spec.num_experts * spec.num_weights for spec in specs.values())
        budget = int(bits * weights / 8)
        groups = [group for layer in options for group in layer]
        least = 8 * sum(min(group.sizes) for group in groups) / weights
        if least > bits:
            raise ValueError(f"bits={bits}: the smallest formats take {least:.2f}")
        _measure(source, specs, options, calibration, threads or num_physical_cores(), progress)
        picked = allocate([g.sizes for g in groups], [g.losses for g in groups], budget)
    rows = tuple(group.chosen(at) for group, at in zip(groups, picked, strict=True))
    spent = sum(row.num_bytes for row in rows)
    return Choice(rows, 8 * spent / weights, sum(row.loss for row in rows))


@dataclass
class _Group:
    """Matrices that get one coding. sizes : bytes of all experts, by coding; losses likewise."""

    layer: int
    projections: tuple[str, ...]
    codings: list[Coding]
    sizes: list[int]
    losses: list[float]

    def chosen(self, at: int) -> Chosen:
        return Chosen(
            self.layer, self.projections, self.codings[at], self.losses[at], self.sizes[at]
        )


def _options(
    layer: int, spec: MoESpec, tried: Sequence[Coding], to_gguf: bool, may_skip: bool
) -> list[_Group]:
    """What may be chosen in a layer. may_skip : types whose blocks rows do not fill."""
    names = projections_of(spec.has_gate)
    if not to_gguf:
        sizes = [_packed_bytes(spec, coding) for coding in tried]
        return [_Group(layer, names, list(tried), sizes, [])]
    groups = []
    for name in names:
        rows, columns = spec.intermediate_size, spec.hidden_size
        if name == "down":
            rows, columns = columns, rows
        fitting = [c for c in tried if not may_skip or columns % c.format.block == 0]
        if not fitting:
            raise ValueError(f"layer {layer} {name}: no type has blocks for rows of {columns}")
        sizes = [spec.num_experts * rows * c.format.row_bytes(columns) for c in fitting]
        groups.append(_Group(layer, (name,), fitting, sizes, []))
    return groups


def _packed_bytes(spec: MoESpec, coding: Coding) -> int:
    packed = replace(
        spec,
        weight_format=coding.format.name,
        group_size=coding.group_size,
        activation_group=None,
        rotation=None,
    )
    return packed.num_experts * packed.layout.expert_bytes


def _measure(
    source: Source,
    specs: dict[int, MoESpec],
    options: Sequence[Sequence[_Group]],
    calibration: Calibration,
    threads: int,
    progress: Callable[[int, int], None],
) -> None:
    """Fill in the losses, layer by layer, each on what the exact layers before it make.

    Twice through the model: for the changes of outputs, and for what noise in each makes of it.
    """
    by_layer = {groups[0].layer: groups for groups in options}
    done = 0

    def on_layer(layer: int, inputs: LayerInputs) -> np.ndarray:
        nonlocal done
        groups = by_layer[layer]
        codings = {name: group.codings for group in groups for name in group.projections}
        losses, output = measure_layer(
            specs[layer], inputs, lambda expert: source.read(layer, expert), codings, threads
        )
        for group in groups:
            group.losses[:] = np.sum([losses[n] for n in group.projections], axis=0).tolist()
        done += 1
        progress(done, 2 * len(by_layer))
        return output

    def exact(layer: int, inputs: LayerInputs) -> np.ndarray:
        nonlocal done
        done += 1
        progress(done, 2 * len(by_layer))
        read = partial(source.read, layer)
        return run_layer(specs[layer], inputs, read, threads, lambda *seen: None)[1]

    source.layer_inputs(calibration, on_layer)
    for layer, sensitivity in source.layer_sensitivities(calibration, exact).items():
        for group in by_layer[layer]:
            group.losses[:] = [loss * sensitivity for loss in group.losses]
