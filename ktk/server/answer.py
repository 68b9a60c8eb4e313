"""One request's answers: tokens of the engine as text, cut at stop strings,
with the log probabilities asked for.
"""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ktk.generate.engine import Engine, Reuse
from ktk.generate.sampling import Sampling, Token
from ktk.generate.text import Detokenizer, StopStrings
from ktk.integration.transformers.tokens import Spelling
from ktk.server.metrics import Metrics


@dataclass
class Piece:
    """What came since the last piece; finish_reason is set in the last one, stop_string if that
    ended it.
    """

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None


@dataclass(frozen=True)
class Stop:
    """What a request wants to end its answer.

    tokens : beside the model's own. is_included : whether it is in the text. keeps_special :
        whether special tokens before it are.
    """

    strings: list[str]
    tokens: frozenset[int] = frozenset()
    is_included: bool = False
    keeps_special: bool = False


class Answer:
    """Generates one. The figures are right once ``pieces`` has ended."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Stop,
        priority: int = 0,
    ) -> None:
        """priority : as of ``Engine.generate``."""
        self._engine, self._metrics, self._priority = engine, metrics, priority
        self.ids, self._sampling, self._max_tokens, self._stop = ids, sampling, max_tokens, stop
        self.num_tokens = 0
        self.reuse = Reuse()

    def _take_reuse(self, reuse: Reuse) -> None:
        self.reuse = reuse

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes.

        Closing the iterator ends the generation. Raises as ``Engine.generate``.
        """
        engine, metrics = self._engine, self._metrics
        text = Detokenizer(engine.tokenizer, self._stop.keeps_special)
        stops = StopStrings(self._stop.strings, self._stop.is_included)
        start = time.perf_counter()
        first: float | None = None
        reason = "length"
        try:
            generated = engine.generate(
                self.ids, self._sampling, self._max_tokens, self._take_reuse, self._priority
            )
            async with aclosing(generated) as source:  # type: ignore[type-var]
                async for tokens in source:
                    if first is None:
                        first = time.perf_counter()
                        metrics.first_token.observe(first - start)
                    piece = Piece("")
                    for token in tokens:
                        self.num_tokens += 1
                        if token.id in self._sampling.ends:
                            reason = "stop"
                            if self._stop.is_included and token.id in self._stop.tokens:
                                piece.tokens.append(token)
                                piece.text += stops.add(text.finish()) + stops.finish()
                                piece.text += engine.tokenizer.decode([token.id])
                            break
                        piece.tokens.append(token)
                        certain = text.add(token.id)
                        if self.num_tokens < self._sampling.min_tokens:
                            piece.text += certain
                            continue
                        piece.text += stops.add(certain)
                        if stops.found:
                            reason = "stop"
                            break
                    if piece.tokens:
                        yield piece
                    if reason == "stop":
                        break
            rest = "" if stops.found else stops.add(text.finish()) + stops.finish()
            yield Piece(rest, finish_reason=reason, stop_string=stops.which)
        finally:
            end = time.perf_counter()
            metrics.generated_tokens.inc(self.num_tokens)
            metrics.duration.observe(end - start)
            if first is not None and self.num_tokens > 1:
                metrics.next_token.observe((end - first) / (self.num_tokens - 1))


class Answers:
    """All answers to one request, numbered from 0: ``tried`` to each prompt in turn, of which the
    best ``given`` are to be given.
    """

    def __init__(self, metrics: Metrics, by_prompt: list[list[Answer]], given: int) -> None:
        self._metrics, self._by_prompt, self._given = metrics, by_prompt, given

    def __len__(self) -> int:
        return sum(map(len, self._by_prompt))

    @property
    def num_given(self) -> int:
        return self._given * len(self._by_prompt)

    @property
    def prompts(self) -> list[list[int]]:
        """Their tokens."""
        return [group[0].ids for group in self._by_prompt]

    @property
    def usage(self) -> dict[str, Any]:
        """cached_tokens : of the prompts, that their first answers found computed."""
        prompt = sum(len(group[0].ids) for group in self._by_prompt)
        cached = sum(group[0].reuse.tokens for group in self._by_prompt)
        made = sum(answer.num_tokens for group in self._by_prompt for answer in group)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number, what came of that answer), as they come.

        A prompt's first answer begins before its others, which then find the prompt computed.
        Closing the iterator ends them all. Raises as ``Engine.generate``.
        """
        self._metrics.prompt_tokens.inc(self.usage["prompt_tokens"])
        if len(self) == 1:
            async with aclosing(self._by_prompt[0][0].pieces()) as source:  # type: ignore[type-var]
                async for piece in source:
                    yield 0, piece
            return
        came: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        for group in self._by_prompt:
            has_begun = asyncio.Event()
            for place, answer in enumerate(group):
                wait = has_begun if place else None
                run = _run(len(tasks), answer, has_begun, wait, came)
                tasks.append(asyncio.create_task(run))
        try:
            left = len(tasks)
            while left:
                index, news = await came.get()
                if isinstance(news, Exception):
                    raise news
                if news is None:
                    left -= 1
                else:
                    yield index, news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def whole(self) -> list[Piece]:
        """The answers to be given, each in one piece.

        Those whose tokens have the largest mean log probability, if more were tried.
        """
        totals = [Piece("") for _ in range(len(self))]
        async with aclosing(self.pieces()) as pieces:  # type: ignore[type-var]
            async for index, piece in pieces:
                total = totals[index]
                total.text += piece.text
                total.tokens += piece.tokens
                total.finish_reason = piece.finish_reason
        tried, chosen = len(self._by_prompt[0]), list[Piece]()
        for first in range(0, len(self), tried):
            own = totals[first : first + tried]
            if self._given < tried:
                own.sort(key=_mean_logprob, reverse=True)
            chosen += own[: self._given]
        return chosen


async def _run(
    index: int,
    answer: Answer,
    has_begun: asyncio.Event,
    wait: asyncio.Event | None,
    came: asyncio.Queue[tuple[int, Piece | Exception | None]],
) -> None:
    """One answer's pieces into ``came``, None or an error last."""
    try:
        if wait is not None:
            await wait.wait()
        async with aclosing(answer.pieces()) as source:  # type: ignore[type-var]
            async for piece in source:
                has_begun.set()
                came.put_nowait((index, piece))
        came.put_nowait((index, None))
    except Exception as error:  # the engine's, which the request's own task raises
        came.put_nowait((index, error))
    finally:
        has_begun.set()


def _mean_logprob(piece: Piece) -> float:
    known = [token.logprob or 0.0 for token in piece.tokens]
    return sum(known) / max(1, len(known))


def _text(own: bytes) -> str:
    """A token's bytes as text; where they are no whole characters, as OpenAI's API spells them."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return "bytes:" + own.decode(errors="backslashreplace")


def chat_logprobs(spelling: Spelling, tokens: list[Token], is_first: bool) -> list[dict[str, Any]]:
    """As /v1/chat/completions gives them in ``logprobs.content``.

    is_first : whether an answer begins with them.
    """

    def entry(token: int, logprob: float | None, first: bool) -> dict[str, Any]:
        own = spelling.bytes_of(token, first)
        return {"token": _text(own), "logprob": logprob, "bytes": list(own)}

    made = []
    for place, token in enumerate(tokens):
        first = is_first and place == 0
        top = [entry(other, logprob, first) for other, logprob in token.top]
        made.append({**entry(token.id, token.logprob, first), "top_logprobs": top})
    return made


class CompletionLogprobs:
    """As /v1/completions gives them, for the pieces of one answer in turn."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the answer so far
        self._is_first = True

    def of(self, tokens: list[Token]) -> dict[str, Any]:
        texts, offsets, top = [], [], []
        for token in tokens:
            own = self._spelling.bytes_of(token.id, self._is_first)
            texts.append(_text(own))
            offsets.append(self._offset)
            top.append(self._top(token))
            self._offset += len(self._characters.decode(own))
            self._is_first = False
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        """By text; a token whose text another one has too, by its id."""
        made: dict[str, float] = {}
        for other, logprob in token.top:
            text = _text(self._spelling.bytes_of(other, self._is_first))
            made[text if text not in made else f"token_id:{other}"] = logprob
        return made
