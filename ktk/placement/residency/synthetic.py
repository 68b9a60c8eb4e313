"""Traces made up: tokens of a text whose subject wanders, over experts some of which are liked.

A token's logits in a layer are

    skew * popularity[layer] + W[layer] @ z + noise * fresh normal values

where popularity is normal and fixed for the trace. z is the text's state: it moves about a subject,
remembered from token to token by ``persistence``, and the subject is drawn anew every ``drift``
tokens on average. All layers see the same z, so that one layer's experts tell of the next one's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktk.placement.residency.trace import Trace

_STATE = 32  # width of z


@dataclass(frozen=True)
class Synthetic:
    """What to make. By default some 40 % of a token's experts are the last token's, too, as of the
    744 billion parameter model that the colibri engine streams (its own figure, 41.3 %).

    prompt : tokens of the first call of each layer, before the tokens one by one.
    """

    num_layers: int = 24
    num_experts: int = 128
    top_k: int = 8
    num_tokens: int = 512
    prompt: int = 0
    skew: float = 0.3
    persistence: float = 0.8
    drift: int = 128
    noise: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "num_tokens", "drift"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be 1..{self.num_experts}")
        if not 0 <= self.prompt <= self.num_tokens:
            raise ValueError(f"prompt={self.prompt}: must be 0..{self.num_tokens}")
        if not (0 <= self.persistence < 1 and self.skew >= 0 and self.noise >= 0):
            raise ValueError(
                f"persistence={self.persistence}, skew={self.skew}, noise={self.noise}: must be "
                "0..1 without 1, and not negative"
            )


def synthetic_trace(options: Synthetic) -> Trace:
    """The same trace for the same options, the seed among them."""
    rng = np.random.default_rng(options.seed)
    layers, experts, tokens = options.num_layers, options.num_experts, options.num_tokens
    popularity = options.skew * rng.standard_normal((layers, experts))
    projection = rng.standard_normal((layers, experts, _STATE)) / np.sqrt(_STATE)
    ids = np.empty((tokens, layers, options.top_k), np.int32)
    weights = np.empty((tokens, layers, options.top_k), np.float32)
    keep = options.persistence
    subject = z = rng.standard_normal(_STATE)
    for token in range(tokens):
        if rng.random() < 1 / options.drift:
            subject = rng.standard_normal(_STATE)
        fresh = rng.standard_normal(_STATE)
        z = subject + keep * (z - subject) + np.sqrt(1 - keep**2) * fresh  # variance 1 about it
        noise = options.noise * rng.standard_normal((layers, experts))
        logits = popularity + projection @ z + noise  # (layers, experts)
        ids[token] = np.argsort(-logits, axis=1, kind="stable")[:, : options.top_k]
        chosen = np.exp(np.take_along_axis(logits, ids[token], axis=1))
        weights[token] = chosen / chosen.sum(axis=1, keepdims=True)
    return _in_calls(options, ids, weights)


def _in_calls(options: Synthetic, ids: np.ndarray, weights: np.ndarray) -> Trace:
    """ids, weights : (tokens, layers, top_k)."""
    order: list[tuple[int, int, int]] = []  # call, layer, token
    call = 0
    steps = [range(options.prompt)] if options.prompt else []
    steps += [range(token, token + 1) for token in range(options.prompt, options.num_tokens)]
    for step in steps:
        for layer in range(options.num_layers):
            order += [(call, layer, token) for token in step]
            call += 1
    calls, layers, tokens = np.array(order, np.int64).T
    return Trace(
        num_layers=options.num_layers,
        num_experts=options.num_experts,
        layers=layers.astype(np.int32),
        calls=calls.copy(),
        tokens=tokens.copy(),
        expert_ids=ids[tokens, layers],
        weights=weights[tokens, layers],
        source=f"made up: {options}",
    )
