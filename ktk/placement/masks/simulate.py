"""What masks would be worth on a trace: hits, and tokens/s by the model of ``costs``.

The first part of a trace is only counted: it is what strategies know. Of the rest, steps of fewer
tokens than a prompt are decode steps, and timed. ``dynamic`` begins with frequency's masks; a
prompt of ``threshold`` tokens or more then puts each layer's most used experts of that prompt on
the GPU, as many as the layer has, as SGLang does in layerwise prefill, of which the time is not
counted. ``online`` begins likewise, and goes with the text by ``updates.OnlineUpdate``; the time of
its swaps is not counted either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ktk.placement.masks.costs import Costs, Demand
from ktk.placement.masks.grid import ExpertGrid
from ktk.placement.masks.published import DYNAMIC
from ktk.placement.masks.strategies import STRATEGIES, Known, first_of_most, place
from ktk.placement.masks.updates import OnlineUpdate
from ktk.placement.residency.trace import Trace

ONLINE = "online"
SIMULATED = (*STRATEGIES, DYNAMIC, ONLINE)


@dataclass(frozen=True)
class Worth:
    """What a strategy is worth with a share of the experts on the GPU.

    hit_rate : of the pairs of token and expert in decode steps, those on the GPU. tokens_per_second
    : of decode steps, by the model.
    """

    strategy: str
    ratio: float
    hit_rate: float
    tokens_per_second: float


@dataclass(frozen=True)
class Steps:
    """A trace, counted. counts : int32 (steps, layers, experts), pairs of each step. num_tokens :
    int64 (steps,).
    """

    counts: np.ndarray
    num_tokens: np.ndarray
    top_k: int

    @classmethod
    def of(cls, trace: Trace) -> Steps:
        """A step ends where layers begin again. Memory: 4 bytes a step, layer and expert."""
        first = np.concatenate([[True], np.diff(trace.calls) != 0])
        layer_of_call = trace.layers[first]
        begins = np.concatenate([[True], np.diff(layer_of_call) <= 0])
        step_of_call = np.cumsum(begins) - 1
        step = step_of_call[np.cumsum(first) - 1]  # of each row
        shape = (int(step[-1]) + 1, trace.num_layers, trace.num_experts)
        valid = trace.expert_ids >= 0
        cell = (step * shape[1] + trace.layers)[:, None] * shape[2] + trace.expert_ids
        counts = np.bincount(cell[valid], minlength=int(np.prod(shape))).astype(np.int32)
        rows = np.bincount(step * shape[1] + trace.layers, minlength=shape[0] * shape[1])
        return cls(counts.reshape(shape), rows.reshape(shape[:2]).max(axis=1), trace.top_k)

    @property
    def grid(self) -> ExpertGrid:
        layers, experts = self.counts.shape[1:]
        return ExpertGrid(layers, experts, tuple(range(layers)))


def simulate(
    steps: Steps,
    costs: Costs,
    ratios: Iterable[float],
    strategies: Iterable[str] = SIMULATED,
    threshold: int = 32,
    learned: float = 0.5,
) -> list[Worth]:
    """Each strategy at each share of the experts on the GPU.

    threshold : tokens of a step from which it is a prompt. learned : share of the steps that are
    counted first. ValueError for an unknown strategy or share, and if no decode step is left.
    """
    names = list(strategies)
    for name in names:
        if name not in SIMULATED:
            raise ValueError(f"strategy={name!r}: must be one of {', '.join(SIMULATED)}")
    if not 0 < learned < 1 or threshold < 2:
        raise ValueError(
            f"learned={learned}, threshold={threshold}: must be between 0 and 1, and at least 2"
        )
    begin = int(len(steps.counts) * learned)
    is_prompt = steps.num_tokens >= threshold
    timed = np.flatnonzero(~is_prompt[begin:]) + begin
    if not begin or not len(timed):
        raise ValueError(
            f"{len(steps.counts)} steps, {int((~is_prompt).sum())} of them below {threshold} "
            "tokens: some must be left to count and to time"
        )
    tokens = max(1, round(float(steps.num_tokens[timed].mean())))
    known = Known(steps.counts[:begin].sum(axis=0), costs, steps.top_k, tokens)
    found = []
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ValueError(f"{ratio} of the experts on the GPU: must be 0..1")
        number = int(steps.grid.total * ratio + 1e-9)
        for name in names:
            first = "frequency" if name in (DYNAMIC, ONLINE) else name
            start = place(steps.grid, first, number, known)
            if name == ONLINE:
                spans = _online_spans(steps, start, begin, is_prompt)
            else:
                spans = _spans(steps, start, begin, is_prompt, name == DYNAMIC)
            found.append(_worth(steps, costs, name, ratio, spans))
    return found


def fitted_costs(
    steps: Steps, on_cpu: float, on_gpu: float, threshold: int = 32, transfer: float = 0.1
) -> Costs:
    """Costs with which decode steps give two known speeds, taken to be the same in all steps.

    on_cpu, on_gpu : tokens/s with all experts there. transfer : its share of the time that all on
    the CPU cost more than all on the GPU. What a step takes with all on the GPU counts as ``rest``:
    two speeds do not tell more. ValueError unless on_cpu < on_gpu, both above 0.
    """
    if not (0 < on_cpu < on_gpu and 0 <= transfer < 1):
        raise ValueError(
            f"{on_cpu} tokens/s on the CPU, {on_gpu} on the GPU, transfer={transfer}: must be "
            "above 0, more on the GPU, and 0..1 without 1"
        )
    is_decode = steps.num_tokens < threshold
    if not is_decode.any():
        raise ValueError(f"no step has fewer than {threshold} tokens: there is none to decode")
    tokens = float(steps.num_tokens[is_decode].mean())
    used = float((steps.counts[is_decode] > 0).sum(axis=(1, 2)).mean())
    slower = tokens / on_cpu - tokens / on_gpu
    layers = steps.counts.shape[1]
    return Costs(
        cpu_expert=slower * (1 - transfer) / used,
        transfer=slower * transfer / layers,
        rest=tokens / on_gpu,
    )


def _spans(
    steps: Steps, start: np.ndarray, begin: int, is_prompt: np.ndarray, is_dynamic: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(masks, decode steps that run with them), in order."""
    decode = np.arange(begin, len(steps.counts))
    if not is_dynamic:
        return [(start, decode[~is_prompt[begin:]])]
    prompts = decode[is_prompt[begin:]]
    cuts = [begin, *prompts.tolist(), len(steps.counts)]
    spans, masks = [], start
    for at, end in itertools.pairwise(cuts):
        if is_prompt[at]:
            masks = updated(masks, steps.counts[at])
            at += 1
        spans.append((masks, np.arange(at, end)))
    return spans


def _online_spans(
    steps: Steps, masks: np.ndarray, begin: int, is_prompt: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As ``_spans``: masks change after any step."""
    update, spans, since = OnlineUpdate(), [], begin
    for at in range(begin, len(steps.counts)):
        after = update.after(steps.counts[at], masks)
        if not np.array_equal(after, masks) or at + 1 == len(steps.counts):
            span = np.arange(since, at + 1)
            spans.append((masks, span[~is_prompt[since : at + 1]]))
            masks, since = after, at + 1
    return spans


def updated(masks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Each layer's most used experts, as many as ``masks`` has of it; of equals the first.

    masks : bool (layers, experts). counts : of the batch, likewise.
    """
    rows = [first_of_most(counts[n], int(row.sum())) for n, row in enumerate(masks)]
    return np.stack(rows)


def _worth(
    steps: Steps,
    costs: Costs,
    name: str,
    ratio: float,
    spans: list[tuple[np.ndarray, np.ndarray]],
) -> Worth:
    hits = pairs = tokens = 0
    seconds = 0.0
    for masks, decode in spans:
        counts = steps.counts[decode]  # (steps, layers, experts)
        demand = Demand((counts > 0).astype(np.float32), counts.astype(np.float32))
        cpu = (demand.cpu_seconds(costs) * ~masks).sum(axis=2)
        cpu += np.where(masks.all(axis=1), 0.0, costs.transfer)
        gpu = (demand.gpu_seconds(costs) * masks).sum(axis=2)
        seconds += float(np.maximum(cpu, gpu).sum()) + costs.rest * len(decode)
        hits += int((counts * masks).sum())
        pairs += int(counts.sum())
        tokens += int(steps.num_tokens[decode].sum())
    return Worth(name, ratio, hits / max(1, pairs), tokens / seconds if seconds else 0.0)
