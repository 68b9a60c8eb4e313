"""A made-up trace of a server: requests whose subjects drift, over experts some of which are liked.

A token's logits in a layer are

    skew * popularity[layer] + subject * W[layer] @ z + noise * fresh normal values

where popularity is normal and fixed for the trace, and z is the request's subject: of the one
before it keeps ``persistence``, so that what was learned from early requests ages. So many requests
run at once: each begins with its prompt in one call; then all give one token a step together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from ktk.placement.residency.trace import Trace

_SUBJECT = 24  # width of z


@dataclass(frozen=True)
class Workload:
    """What to make. ValueError if it cannot be made.

    at_once : requests that run together. prompt, answer : tokens of a request, answers from half to
    one and a half of that.
    """

    num_layers: int = 12
    num_experts: int = 128
    top_k: int = 8
    requests: int = 60
    at_once: int = 2
    prompt: int = 40
    answer: int = 64
    skew: float = 0.6
    subject: float = 1.0
    persistence: float = 0.3
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "seed" or isinstance(value, float) else 1
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{field.name}={value}: must be at least {least}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be 1..{self.num_experts}")
        if self.persistence > 1:
            raise ValueError(f"persistence={self.persistence}: must be 0..1")


def served_trace(options: Workload) -> Trace:
    """The same trace for the same options, the seed among them."""
    rng = np.random.default_rng(options.seed)
    layers, experts = options.num_layers, options.num_experts
    popularity = (options.skew * rng.standard_normal((layers, experts))).astype(np.float32)
    projection = rng.standard_normal((layers, experts, _SUBJECT)) / math.sqrt(_SUBJECT)
    keep, z = options.persistence, rng.standard_normal(_SUBJECT)
    ids, lengths = [], []
    for _ in range(options.requests):
        answer = max(1, round(options.answer * rng.uniform(0.5, 1.5)))
        liked = popularity + (options.subject * (projection @ z)).astype(np.float32)
        shape = (options.prompt + answer, layers, experts)
        logits = liked + options.noise * rng.standard_normal(shape, np.float32)
        top = np.argpartition(-logits, options.top_k - 1, axis=2)[:, :, : options.top_k]
        ids.append(top.astype(np.int32))
        lengths.append(answer)
        z = keep * z + math.sqrt(1 - keep**2) * rng.standard_normal(_SUBJECT)
    return _in_calls(options, ids, _steps(options, lengths))


def _steps(options: Workload, answers: list[int]) -> list[list[tuple[int, range]]]:
    """Each step's tokens: (request, positions), of one prompt or of all that run."""
    waiting = list(range(options.requests))
    running: dict[int, int] = {}  # request -> next position
    steps: list[list[tuple[int, range]]] = []
    while waiting or running:
        if waiting and len(running) < options.at_once:
            request = waiting.pop(0)
            steps.append([(request, range(options.prompt))])
            running[request] = options.prompt
            continue
        steps.append([(request, range(at, at + 1)) for request, at in running.items()])
        running = {
            request: at + 1
            for request, at in running.items()
            if at + 1 < options.prompt + answers[request]
        }
    return steps


def _in_calls(
    options: Workload, ids: list[np.ndarray], steps: list[list[tuple[int, range]]]
) -> Trace:
    """ids : of each request (tokens, layers, top_k)."""
    layers = options.num_layers
    experts, of_layer, of_call, position = [], [], [], []
    for number, step in enumerate(steps):
        chosen = np.concatenate([ids[r][span.start : span.stop] for r, span in step])
        places = np.concatenate([np.arange(span.start, span.stop) for _, span in step])
        rows = len(places)
        experts.append(chosen.swapaxes(0, 1).reshape(layers * rows, options.top_k))
        of_layer.append(np.repeat(np.arange(layers, dtype=np.int32), rows))
        of_call.append(number * layers + np.repeat(np.arange(layers), rows))
        position.append(np.tile(places, layers))
    found = np.concatenate(experts)
    return Trace(
        num_layers=layers,
        num_experts=options.num_experts,
        layers=np.concatenate(of_layer),
        calls=np.concatenate(of_call).astype(np.int64),
        tokens=np.concatenate(position).astype(np.int64),
        expert_ids=found,
        weights=np.full(found.shape, 1 / options.top_k, np.float32),
        source=f"made up: {options}",
    )
