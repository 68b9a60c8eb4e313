"""Choosing a sequence's next token, with a random generator of its own: so a seed means the same in any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# A smaller temperature is greedy: it is no normal float32, so arithmetic may take it for 0. Larger ones divide how far logits
# lie below the largest, 0 or less, so nothing overflows but to minus infinity, whose probability is 0: the limit.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy, top_k 0 and top_p 1 keep all tokens; seed None is a random one.

    num_logprobs : alternatives to report with each token; 0 its own log probability alone, None nothing. ends : tokens that end
    the text, of which none is chosen before min_tokens others.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    num_logprobs: int | None = None
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Any, **given: Any) -> Sampling:
        """The defaults of a model's generation_config, given values (not None) over them."""
        greedy = not getattr(config, "do_sample", False)
        defaults = {
            "temperature": 0.0 if greedy else getattr(config, "temperature", None),
            "top_p": getattr(config, "top_p", None),
            "top_k": None if greedy else getattr(config, "top_k", None),
        }
        chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        return cls(**{name: value for name, value in chosen.items() if value is not None})


@dataclass(frozen=True)
class Token:
    """One chosen token. logprob, top : natural logarithms under the model's own distribution, before temperature."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence and keeps them in ``tokens``."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.tokens: list[Token] = []
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.temperature >= SMALLEST_TEMPERATURE:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed % 2**63)
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: torch.Tensor) -> int:
        """The next token's id. logits : float32 (vocab_size,)."""
        allowed = self._without_ends(logits)
        if self._generator is None:
            chosen = int(allowed.argmax())
        else:
            no_ids = torch.LongTensor(1, 0)  # no warper reads them
            scores = (allowed - allowed.max()) / self.sampling.temperature
            probabilities = self._warpers(no_ids, scores[None])[0].softmax(-1)  # (vocab_size,)
            chosen = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self.tokens.append(self._token(chosen, logits))
        return chosen

    def _without_ends(self, logits: torch.Tensor) -> torch.Tensor:
        ends = [token for token in self.sampling.ends if token < len(logits)]
        if len(self.tokens) >= self.sampling.min_tokens or not ends:
            return logits
        return logits.index_fill(0, torch.tensor(ends), float("-inf"))

    def _token(self, chosen: int, logits: torch.Tensor) -> Token:
        count = self.sampling.num_logprobs
        if count is None:
            return Token(chosen)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)


class ChosenBySampler(LogitsProcessor):
    """For generate(): leaves only the token that a Sampler chose."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids : (1, length). scores : (1, vocab_size)."""
        return only(scores, [self.sampler.choose(scores[0].float())])


def only(scores: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """scores (rows, vocab_size) in which each of the first rows has only its chosen token left, overwritten in place."""
    rows = torch.arange(len(chosen))
    scores[rows] = float("-inf")
    scores[rows, torch.tensor(chosen, dtype=torch.long)] = 0.0
    return scores
