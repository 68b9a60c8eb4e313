"""One request's answer: tokens of the engine as text, cut at stop strings, with the log probabilities asked for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ktk.integration.transformers.sampling import Sampling, Token
from ktk.integration.transformers.text import REPLACEMENT, Detokenizer, StopStrings
from ktk.server.engine import Engine
from ktk.server.metrics import Metrics


@dataclass
class Piece:
    """What came since the last piece; finish_reason is set in the last one."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Answer:
    """Generates for one request. The figures are right once ``pieces`` has ended."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int,
        stops: list[str],
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self.ids, self._sampling, self._max_tokens, self._stops = ids, sampling, max_tokens, stops
        self.num_tokens = 0

    @property
    def usage(self) -> dict[str, int]:
        prompt = len(self.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
        }

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes. Closing the iterator ends the generation. Raises as ``Engine.generate``."""
        engine, metrics = self._engine, self._metrics
        text, stops = Detokenizer(engine.tokenizer), StopStrings(self._stops)
        start = time.perf_counter()
        first: float | None = None
        reason = "length"
        metrics.prompt_tokens.inc(len(self.ids))
        try:
            generated = engine.generate(self.ids, self._sampling, self._max_tokens)
            async with aclosing(generated) as source:  # type: ignore[type-var]
                async for tokens in source:
                    if first is None:
                        first = time.perf_counter()
                        metrics.first_token.observe(first - start)
                    piece = Piece("")
                    for token in tokens:
                        self.num_tokens += 1
                        if token.id in engine.eos:
                            reason = "stop"
                            break
                        piece.tokens.append(token)
                        piece.text += stops.add(text.add(token.id))
                        if stops.found:
                            reason = "stop"
                            break
                    if piece.tokens:
                        yield piece
                    if reason == "stop":
                        break
            rest = "" if stops.found else stops.add(text.finish()) + stops.finish()
            yield Piece(rest, finish_reason=reason)
        finally:
            end = time.perf_counter()
            metrics.generated_tokens.inc(self.num_tokens)
            metrics.duration.observe(end - start)
            if first is not None and self.num_tokens > 1:
                metrics.next_token.observe((end - first) / (self.num_tokens - 1))


def _token_text(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """A token's text and bytes; the vocabulary's own spelling, and no bytes, where it is a part of a character."""
    text: str = tokenizer.decode([token])
    if REPLACEMENT in text:
        return tokenizer.convert_ids_to_tokens(token), None
    return text, list(text.encode())


def chat_logprobs(tokenizer: Any, tokens: list[Token]) -> list[dict[str, Any]]:
    """As /v1/chat/completions gives them in ``logprobs.content``."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, own_bytes = _token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": own_bytes}

    return [
        {**entry(t.id, t.logprob), "top_logprobs": [entry(i, p) for i, p in t.top]} for t in tokens
    ]


def completion_logprobs(tokenizer: Any, tokens: list[Token], offset: int) -> dict[str, Any]:
    """As /v1/completions gives them. offset : characters of the answer before these tokens."""
    texts = [_token_text(tokenizer, t.id)[0] for t in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{_token_text(tokenizer, i)[0]: p for i, p in t.top} for t in tokens],
        "text_offset": offsets,
    }
