"""Choosing a sequence's next token, with a random generator of its own:
so a seed means the same in any batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ktk.integration.transformers.tokens import own_sampling

# A smaller temperature is greedy: it is no normal float32, so arithmetic may take it for 0. Larger
# ones divide how far logits lie below the largest, 0 or less, so nothing overflows but to minus
# infinity, whose probability is 0: the limit.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


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


@dataclass(frozen=True)
class Token:
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

    def choose(self, logits: torch.Tensor) -> int:
        """The next token's id. logits : float32 (vocab_size,)."""
        allowed = logits if self._guide is None else self._guide.allowed(logits)
        allowed = self._without_ends(self._adjusted(allowed))
        if self._generator is None:
            chosen = int(allowed.argmax())
        else:
            scores = (allowed - allowed.max()) / self.sampling.temperature  # (vocab_size,)
            if self.sampling.min_p:
                scores = scores.masked_fill(scores < math.log(self.sampling.min_p), float("-inf"))
            if self.sampling.top_k:
                scores = of_largest(scores, self.sampling.top_k)
            if self.sampling.top_p < 1:
                scores = of_likeliest(scores, self.sampling.top_p)
            probabilities = scores.softmax(-1)
            chosen = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if self._guide is not None:
            self._guide.take(chosen)
        self._counts[chosen] += 1
        self.tokens.append(self._token(chosen, logits))
        return chosen

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


def of_largest(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """scores (vocab_size,), minus infinity except the top_k largest and those equal to the least
    of them.
    """
    least = scores.topk(min(top_k, len(scores))).values[-1]
    return scores.masked_fill(scores < least, float("-inf"))


def of_likeliest(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """scores (vocab_size,), minus infinity except the likeliest tokens that have a probability
    of top_p together.
    """
    ascending, ids = scores.sort()
    is_rest = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    is_rest[-1] = False
    return scores.index_fill(0, ids[is_rest], float("-inf"))
