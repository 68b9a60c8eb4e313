"""Choosing a sequence's next token, with a random generator of its own:
so a seed means the same in any batch.
"""

from __future__ import annotations

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
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    num_logprobs: int | None = None
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()
    grammar: Grammar | None = None

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
    """Chooses the tokens of one sequence and keeps them in ``tokens``."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.tokens: list[Token] = []
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
        allowed = self._without_ends(allowed)
        if self._generator is None:
            chosen = int(allowed.argmax())
        else:
            scores = (allowed - allowed.max()) / self.sampling.temperature  # (vocab_size,)
            if self.sampling.top_k:
                scores = of_largest(scores, self.sampling.top_k)
            if self.sampling.top_p < 1:
                scores = of_likeliest(scores, self.sampling.top_p)
            probabilities = scores.softmax(-1)
            chosen = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if self._guide is not None:
            self._guide.take(chosen)
        self.tokens.append(self._token(chosen, logits))
        return chosen

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
