"""Choosing a sequence's next token, with a random generator of its own:
so a seed means the same in any batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ktk.integration.transformers.tokens import own_sampling

# A smaller temperature is greedy: it is no normal float32, so arithmetic may take it for 0. Larger
# ones divide how far logits lie below the largest, 0 or less, so nothing overflows but to minus
# infinity, whose probability is 0: the limit.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
# A nucleus is looked for among tokens at least so many times less likely than the likeliest: 64,
# then 4096, ... times, in the end all.
NUCLEUS_STEP, NUCLEUS_LEAST = 64.0, 1e-30
DRAW_BLOCK = 512  # weights whose sum is taken before one of them is chosen


class Guide(Protocol):
    """Which tokens may follow those of one answer."""

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (vocab_size,), minus infinity where a token may not follow."""

    def take(self, token: int) -> None:
        """The token was chosen."""


class Grammar(Protocol):
    """The form that answers must have."""

    def start(self) -> Guide:
        """At an answer's beginning."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy, top_k 0 and top_p 1 keep all tokens; seed
    None is a random one.

    num_logprobs : alternatives to report with each token; 0 its own log probability alone, None
    nothing. ends : tokens that end the text, of which none is chosen before min_tokens others,
    except where the grammar leaves no other.

    min_p : tokens less likely than this times the likeliest are left out. logit_bias : (token, what
    is added to its logit). presence_penalty, frequency_penalty : taken from the logit of a token
    that the answer has; for each time it has it. repetition_penalty : divides positive logits of
    tokens that the prompt or the answer has, and multiplies negative ones. Adding comes before
    penalties, those before temperature, min_p, top_k, top_p, in this order.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    num_logprobs: int | None = None
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: Any, **given: Any) -> Sampling:
        """The defaults of a model's generation_config, given values (not None) over them."""
        samples, own = own_sampling(config)
        if not samples:
            own = {"temperature": 0.0, **{k: v for k, v in own.items() if k == "top_p"}}
        chosen: dict[str, Any] = {**own, **{k: v for k, v in given.items() if v is not None}}
        return cls(**chosen)

    @cached_property
    def is_largest(self) -> bool:
        """Whether from ``min_tokens`` on the largest logit alone decides, and nothing is told of
        it.
        """
        changes = self.logit_bias or self.presence_penalty or self.frequency_penalty
        return (
            self.temperature < SMALLEST_TEMPERATURE
            and self.grammar is None
            and self.num_logprobs is None
            and self.repetition_penalty == 1
            and not changes
        )


class Token(NamedTuple):
    """One chosen token. logprob, top : natural logarithms under the model's own distribution,
    before temperature.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence and keeps them in ``tokens``. prompt : those before."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.tokens: list[Token] = []
        self._counts = Counter[int]()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._guide = None if sampling.grammar is None else sampling.grammar.start()
        self._generator: torch.Generator | None = None
        if sampling.temperature >= SMALLEST_TEMPERATURE:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed % 2**63)

    @property
    def takes_largest(self) -> bool:
        """Whether ``choose`` would give the place of the largest logit, whatever the others are."""
        return self.sampling.is_largest and len(self.tokens) >= self.sampling.min_tokens

    def take_largest(self, token: int) -> int:
        """``choose`` where ``takes_largest`` holds. token : the place of the largest logit."""
        self.tokens.append(Token(token))
        return token

    def choose(self, logits: torch.Tensor) -> int:
        """The next token's id. logits : float32 (vocab_size,)."""
        allowed = logits if self._guide is None else self._guide.allowed(logits)
        allowed = self._without_ends(self._adjusted(allowed))
        scores: np.ndarray = allowed.numpy()  # (vocab_size,)
        if self._generator is None:
            chosen = int(scores.argmax())  # 5 us of 49152, torch's 50
        else:
            weights = self._weights(scores)
            share = torch.rand((), generator=self._generator, dtype=torch.float64)
            chosen = drawn(weights, float(share))
        if self._guide is not None:
            self._guide.take(chosen)
        self._counts[chosen] += 1
        self.tokens.append(self._token(chosen, logits))
        return chosen

    def _weights(self, scores: np.ndarray) -> np.ndarray:
        """float32 (vocab_size,): how likely each token is beside the likeliest one."""
        own = self.sampling
        with np.errstate(all="ignore"):  # minus infinity of both, and what a tiny temperature makes
            weights = scores - scores.max()
            weights /= np.float32(own.temperature)
            np.exp(weights, out=weights)
        if own.min_p:
            weights[weights < np.float32(own.min_p)] = 0
        if own.top_k:
            weights = of_largest(weights, own.top_k)
        return of_likeliest(weights, own.top_p) if own.top_p < 1 else weights

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """With what the request adds to logits and takes from them."""
        own = self.sampling
        if own.logit_bias:
            biased, values = zip(*own.logit_bias, strict=True)
            logits = logits.index_add(0, torch.tensor(biased), torch.tensor(values))
        if own.repetition_penalty != 1 and (self._seen or self._counts):
            tokens = torch.tensor(sorted(self._seen | self._counts.keys()))
            before = logits[tokens]
            factor = own.repetition_penalty
            after = torch.where(before > 0, before / factor, before * factor)
            logits = logits.index_copy(0, tokens, after)
        if self._counts and (own.presence_penalty or own.frequency_penalty):
            tokens = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values())).float()
            taken = own.presence_penalty + own.frequency_penalty * counts
            logits = logits.index_add(0, tokens, -taken)
        return logits

    def _without_ends(self, logits: torch.Tensor) -> torch.Tensor:
        ends = [token for token in self.sampling.ends if token < len(logits)]
        if len(self.tokens) >= self.sampling.min_tokens or not ends:
            return logits
        others = logits.index_fill(0, torch.tensor(ends), float("-inf"))
        return logits if self._guide and bool(others.max().isneginf()) else others

    def _token(self, chosen: int, logits: torch.Tensor) -> Token:
        count = self.sampling.num_logprobs
        if count is None:
            return Token(chosen)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)


def places_of_largest(logits: torch.Tensor) -> list[int]:
    """Of each row of (rows, vocab_size) the first place of its largest number."""
    if logits.element_size() == 2:  # as integers positive ones lie in the same order: no copy
        bits: np.ndarray = logits.view(torch.int16).numpy()
        places = bits.argmax(1)
        if bits[np.arange(len(bits)), places].min() > 0:
            found: list[int] = places.tolist()
            return found
    scores: np.ndarray = logits.float().numpy()
    return [int(place) for place in scores.argmax(1)]


def of_largest(weights: np.ndarray, top_k: int) -> np.ndarray:
    """weights (vocab_size,), 0 except the top_k largest and those equal to the least of them."""
    least = torch.from_numpy(weights).topk(min(top_k, len(weights))).values[-1]
    return np.where(weights < float(least), np.float32(0), weights)


def of_likeliest(weights: np.ndarray, top_p: float) -> np.ndarray:
    """weights (vocab_size,), 0 except the largest that have top_p of their sum together.

    Only those are sorted that may be among them: of 49152 tokens 0.1 ms, of all 3 ms.
    """
    total, least = float(weights.sum()), float(weights.max())
    rest = (1 - top_p) * total
    places = np.arange(0)
    while least:
        least = least / NUCLEUS_STEP if least > NUCLEUS_LEAST else 0.0
        places = np.flatnonzero(weights > least)
        if float(weights[places].sum()) > total - rest:
            break
    places = places[weights[places].argsort(kind="stable")]
    ascending = weights[places]
    below = ascending.cumsum(dtype=np.float64)
    is_left = total - below[-1] + below > rest
    is_left[-1] = True
    left = np.zeros_like(weights)
    left[places[is_left]] = ascending[is_left]
    return left


def drawn(weights: np.ndarray, share: float) -> int:
    """The place where the sum of weights, (vocab_size,), passes so much of it, 0 <= share < 1."""
    whole = len(weights) // DRAW_BLOCK * DRAW_BLOCK
    sums = [weights[:whole].reshape(-1, DRAW_BLOCK).sum(1), [weights[whole:].sum()]]
    below = np.concatenate(sums).cumsum(dtype=np.float64)
    wanted = share * below[-1]
    block = int(below.searchsorted(wanted, "right"))
    first = block * DRAW_BLOCK
    own = weights[first : first + DRAW_BLOCK]
    inside = own.cumsum(dtype=np.float64).searchsorted(
        wanted - (below[block - 1] if block else 0.0), "right"
    )
    return first + min(int(inside), int(own.nonzero()[0][-1]))  # of a sum that was rounded
