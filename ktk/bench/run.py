"""The flow of a benchmark: rounds over token counts; in each, ceilings, every method's calls,
ceilings again.

A round's figures were taken within a second of its ceilings, so their ratio holds on a machine
whose speed changes from one second to the next; the median over rounds then drops the rounds in
which something else ran.
"""

from __future__ import annotations

import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ktk import __version__
from ktk.bench.layer import Layer, Method, build, check_memory, has_torch, hidden_states
from ktk.bench.roofline import READ, Bound, Roofline, bound, l3_bytes
from ktk.bench.shapes import Shape, routings
from ktk.machine import cpu

# Different routings in turn: enough for a round of short calls; long ones touch every expert
# anyway.
FEW_TOKENS, MANY_ROUTINGS, FEW_ROUTINGS = 16, 64, 8
# Ceilings are sampled again before the next method once this many seconds have passed.
SAMPLE_AGAIN = 0.3
# A ceiling that moved by more than this factor within a round is not the same any more.
STEADY = 1.2
# A layer below this many times the last-level caches does not show what RAM gives.
CACHE_FACTOR = 4

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody sees."""


@dataclass
class Round:
    """One method's calls in one round. seconds, touched : per call.

    reads (bytes/s), peaks (operations/s) : the ceilings, sampled before and after.
    """

    seconds: list[float]
    touched: list[float]
    reads: tuple[float, float]
    peaks: tuple[float, float]

    @property
    def read(self) -> float:
        """The higher sample: a disturbed one is too low, and a high ceiling flatters nobody."""
        return max(self.reads)

    @property
    def peak(self) -> float:
        """Likewise."""
        return max(self.peaks)

    def is_steady(self, by: str) -> bool:
        """Whether the ceiling that sets the bound stayed the same:
        else nobody knows which one the calls met.
        """
        pair = self.reads if by == "memory" else self.peaks
        return max(pair) <= STEADY * min(pair)


@dataclass
class Case:
    """One method at one number of tokens."""

    shape: Shape
    method: str
    kernel: str
    peak_name: str
    expert_bytes: int
    num_tokens: int
    rounds: list[Round] = field(default_factory=list)

    @property
    def operations(self) -> int:
        return self.shape.operations(self.num_tokens)

    @property
    def round_medians(self) -> list[float]:
        """Seconds of a call, the median of each round."""
        return [statistics.median(r.seconds) for r in self.rounds]

    @property
    def seconds(self) -> float:
        """Median over rounds of the median call."""
        return statistics.median(self.round_medians)

    @property
    def touched_experts(self) -> float:
        """Different experts of a call, the mean of all calls."""
        return statistics.fmean(n for r in self.rounds for n in r.touched)

    @property
    def bound(self) -> Bound:
        """Of the average call, by the medians of the ceilings."""
        read = statistics.median(r.read for r in self.rounds)
        peak = statistics.median(r.peak for r in self.rounds)
        return bound(self.touched_experts * self.expert_bytes, self.operations, read, peak)

    @property
    def round_fractions(self) -> list[float]:
        """Of each round: the median over its calls of bound / time, by that round's ceilings."""
        found = []
        for r in self.rounds:
            bounds = [
                bound(n * self.expert_bytes, self.operations, r.read, r.peak) for n in r.touched
            ]
            pairs = zip(bounds, r.seconds, strict=True)
            found.append(statistics.median(b.seconds / s for b, s in pairs))
        return found

    @property
    def steady_rounds(self) -> list[bool]:
        """Which rounds count: those with steady ceilings, all if there is none."""
        by = self.bound.by
        steady = [r.is_steady(by) for r in self.rounds]
        return steady if any(steady) else [True] * len(steady)

    @property
    def fraction(self) -> float:
        """Of the bound, median over the steady rounds.

        Above 1 where a disturbance hit the ceilings only.
        """
        pairs = zip(self.round_fractions, self.steady_rounds, strict=True)
        return statistics.median(fraction for fraction, counts in pairs if counts)

    def to_json(self) -> dict[str, Any]:
        """Times in ms, rates in GB/s of touched experts and GOP/s."""
        touched_bytes = self.touched_experts * self.expert_bytes
        limit = self.bound
        calls = [s for r in self.rounds for s in r.seconds]
        return {
            "method": self.method,
            "kernel": self.kernel,
            "tokens": self.num_tokens,
            "calls": len(calls),
            "median_ms": self.seconds * 1e3,
            "min_ms": min(calls) * 1e3,
            "max_ms": max(calls) * 1e3,
            "round_ms": [s * 1e3 for s in self.round_medians],
            "touched_experts": self.touched_experts,
            "touched_bytes": touched_bytes,
            "operations": self.operations,
            "gb_per_s": touched_bytes / self.seconds / 1e9,
            "gop_per_s": self.operations / self.seconds / 1e9,
            "tokens_per_s": self.num_tokens / self.seconds,
            "peak": self.peak_name,
            "bound_by": limit.by,
            "bound_ms": limit.seconds * 1e3,
            "fraction": self.fraction,
            "round_fractions": self.round_fractions,
            "steady_rounds": self.steady_rounds,
            "fraction_of_medians": limit.seconds / self.seconds,
        }


@dataclass
class Result:
    """One shape: its methods as they were built, and a case per method and number of tokens."""

    shape: Shape
    layers: list[dict[str, Any]]
    cases: list[Case]
    ceilings: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape.name,
            "hidden_size": self.shape.hidden_size,
            "intermediate_size": self.shape.intermediate_size,
            "num_experts": self.shape.num_experts,
            "cut_from": self.shape.cut_from,
            "top_k": self.shape.top_k,
            "methods": self.layers,
            "ceilings": self.ceilings,
            "cases": [case.to_json() for case in self.cases],
        }


def case_of(shape: Shape, layer: Layer, num_tokens: int) -> Case:
    return Case(shape, layer.method, layer.kernel, layer.peak, layer.expert_bytes, num_tokens)


def describe(layer: Layer) -> dict[str, Any]:
    return {
        "method": layer.method,
        "backend": layer.backend,
        "kernel": layer.kernel,
        "bits_per_weight": layer.bits_per_weight,
        "expert_bytes": layer.expert_bytes,
        "layer_bytes": layer.layer_bytes,
        "peak": layer.peak,
        "in_cache": layer.layer_bytes < CACHE_FACTOR * l3_bytes(),
    }


def build_layers(
    shape: Shape,
    methods: list[Method],
    *,
    num_threads: int | None = None,
    more_bytes: int = 0,
    progress: Progress = silent,
) -> list[Layer]:
    """One layer per method. more_bytes : memory needed beside them.

    Raises MemoryError if they do not fit at once, else as ``ktk.bench.layer.build``.
    """
    gc.collect()  # layers of the shape before
    check_memory(shape, methods, more_bytes)
    layers: list[Layer] = []
    for method in methods:
        progress(len(layers), len(methods), f"{shape.name}: packing {method.text}")
        layers.append(build(shape, method, num_threads))
    return layers


def measure(
    shape: Shape,
    layers: list[Layer],
    tokens: list[int],
    *,
    rounds: int,
    roofline: Roofline,
    progress: Progress = silent,
) -> Result:
    """Check each layer at every number of tokens, and measure them in rounds.

    progress : told (steps done, steps in all, what comes). Raises RuntimeError if a layer computes
        wrong.
    """
    steps = len(tokens) * (1 + rounds)
    hidden = hidden_states(shape, max(tokens))
    cases: list[list[Case]] = []
    callers = []
    for i, num_tokens in enumerate(tokens):
        progress(i, steps, f"{shape.name}: checking {num_tokens} tokens")
        count = MANY_ROUTINGS if num_tokens <= FEW_TOKENS else FEW_ROUTINGS
        pool = routings(shape, num_tokens, count, seed=num_tokens)
        for layer in layers:
            layer.check(hidden[:num_tokens], pool[0])
        callers.append([layer.caller(hidden[:num_tokens], pool) for layer in layers])
        cases.append([case_of(shape, layer, num_tokens) for layer in layers])
    gc.collect()
    names = [READ, *dict.fromkeys(layer.peak for layer in layers)]
    already = {name: len(values) for name, values in roofline.samples.items()}
    for number in range(rounds):
        for i, num_tokens in enumerate(tokens):
            done = len(tokens) * (1 + number) + i
            progress(done, steps, f"{shape.name}: round {number + 1}, {num_tokens} tokens")
            first = number % len(layers)  # nobody is always the one behind the ceilings
            order = [*range(first, len(layers)), *range(first)]
            ceilings = [roofline.sample(names)]
            sampled = time.perf_counter()
            calls = {}
            for j in order:
                calls[j] = (len(ceilings) - 1, *callers[i][j].round())
                if j == order[-1] or time.perf_counter() - sampled > SAMPLE_AGAIN:
                    ceilings.append(roofline.sample(names))
                    sampled = time.perf_counter()
            for j, (at, seconds, touched) in calls.items():
                before, after, peak = ceilings[at], ceilings[at + 1], layers[j].peak
                reads, peaks = (before[READ], after[READ]), (before[peak], after[peak])
                cases[i][j].rounds.append(Round(seconds, touched, reads, peaks))
    progress(steps, steps, f"{shape.name}: done")
    described = [describe(layer) for layer in layers]
    return Result(
        shape, described, [c for row in cases for c in row], roofline.report(skip=already)
    )


def machine(num_threads: int) -> dict[str, Any]:
    """What was measured on, JSON-able."""
    return {
        "cpu": cpu.brand(),
        "features": sorted(cpu.detect().names),
        "threads": num_threads,
        "physical_cores": cpu.num_physical_cores(),
        "allowed_cpus": len(cpu.allowed_cpus()),
        "numa_nodes": len(cpu.numa_nodes()),
        "l3_bytes": l3_bytes(),
        "memory_bytes": cpu.memory()[0],
        "huge_pages": cpu.huge_pages(),
        "system": f"{platform.system()} {platform.release()}",
    }


def report(results: list[Result], num_threads: int, rounds: int) -> dict[str, Any]:
    """The whole run as one JSON-able object."""
    return {
        "ktk": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(num_threads),
        "rounds": rounds,
        "on_torch_threads": has_torch(),
        "results": [result.to_json() for result in results],
    }
