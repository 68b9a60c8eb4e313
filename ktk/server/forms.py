"""How answers look: OpenAI's JSON of each route, whole or as server-sent events."""

from __future__ import annotations

import json
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ktk.integration.transformers.tokens import Spelling
from ktk.server.answer import Answer, CompletionLogprobs, Piece, chat_logprobs
from ktk.server.protocol import ChatRequest, CompletionRequest

log = logging.getLogger("ktk")


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Form(ABC):
    """How answers look: a route's JSON, whole or in chunks."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(
        self, model: str, spelling: Spelling, body: ChatRequest | CompletionRequest
    ) -> None:
        self.model, self.spelling, self.body = model, spelling, body
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.is_first = True  # no token has been given out
        self.logprobs = CompletionLogprobs(spelling)

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The response of a request that does not stream."""
        total = Piece("")
        async with aclosing(answer.pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                total.text += piece.text
                total.tokens += piece.tokens
                total.finish_reason = piece.finish_reason
        return self._frame(self.object, [self.choice(total)], usage=answer.usage)

    async def events(self, pieces: AsyncIterator[Piece], answer: Answer) -> AsyncIterator[str]:
        """Server-sent events, [DONE] last."""
        wants_usage = self.body.include_usage
        nothing_yet = {"usage": None} if wants_usage else {}
        begun = False
        try:
            async with aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    for choice in self.chunks(piece, not begun):
                        yield event(self._frame(self.chunk_object, [choice], **nothing_yet))
                    begun = True
            if wants_usage:
                yield event(self._frame(self.chunk_object, [], usage=answer.usage))
        except (
            Exception
        ) as error:  # the engine's, or this request's own: the stream has begun with 200
            if not begun:
                raise
            log.exception("an answer's stream failed")
            yield event(error_body(str(error) or type(error).__name__, "server_error"))
        yield "data: [DONE]\n\n"

    @abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """The one choice of a whole response."""

    @abstractmethod
    def chunks(self, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        """The choices of a stream's next chunks."""


class Chat(Form):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.body.num_logprobs is None:
            return None
        content = chat_logprobs(self.spelling, piece.tokens, self.is_first)
        self.is_first = self.is_first and not piece.tokens
        return {"content": content, "refusal": None}

    def choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": 0,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def chunks(self, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        def chunk(
            delta: dict[str, str], reason: str | None, logprobs: Any = None
        ) -> dict[str, Any]:
            return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

        made = [chunk({"role": "assistant", "content": ""}, None)] if is_first else []
        if piece.text or piece.tokens:
            made.append(chunk({"content": piece.text}, None, self._logprobs(piece)))
        if piece.finish_reason is not None:
            made.append(chunk({}, piece.finish_reason))
        return made


class Completion(Form):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.body.num_logprobs is not None:
            logprobs = self.logprobs.of(piece.tokens)
        return {
            "index": 0,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def chunks(self, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        return [self.choice(piece)]
