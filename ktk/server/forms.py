"""How answers look: OpenAI's JSON of each route, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ktk.integration.transformers.tokens import Spelling
from ktk.server.answer import Answers, CompletionLogprobs, Piece, chat_logprobs
from ktk.server.message import Reader, Said
from ktk.server.protocol import ChatRequest, CompletionRequest

_DONE = "data: [DONE]\n\n"


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Choice(ABC):
    """One answer in a response: whole, or in chunks of a stream."""

    def __init__(self, index: int, spelling: Spelling) -> None:
        self.index, self._spelling = index, spelling

    @abstractmethod
    def whole(self, piece: Piece) -> dict[str, Any]:
        """Of an answer that came in one piece."""

    @abstractmethod
    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Of what came next."""


class ChatChoice(Choice):
    """reader : tells the text's parts apart."""

    def __init__(self, index: int, spelling: Spelling, body: ChatRequest, reader: Reader) -> None:
        super().__init__(index, spelling)
        self._body, self._reader = body, reader
        self._has_begun = False  # a chunk was given out
        self._is_first = True  # no token was

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._body.num_logprobs is None:
            return None
        content = chat_logprobs(self._spelling, piece.tokens, self._is_first)
        self._is_first = self._is_first and not piece.tokens
        return {"content": content, "refusal": None}

    def whole(self, piece: Piece) -> dict[str, Any]:
        said, rest = self._reader.add(piece.text), self._reader.finish()
        calls = [*said.calls, *rest.calls]
        content = said.content + rest.content
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if calls else ""),
            "refusal": None,
        }
        if reasoning := said.reasoning + rest.reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [call.to_json() for call in calls]
        return {
            "index": self.index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": self._reason(piece),
        }

    def _reason(self, piece: Piece) -> str | None:
        is_call = piece.finish_reason == "stop" and self._reader.num_calls
        return "tool_calls" if is_call else piece.finish_reason

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        made = []
        if not self._has_begun:
            self._has_begun = True
            made.append(self._chunk({"role": "assistant", "content": ""}))
        deltas = self._deltas(self._reader.add(piece.text))
        if piece.finish_reason is not None:
            deltas += self._deltas(self._reader.finish())
        if piece.tokens and not deltas:  # their text is not certain yet
            deltas = [{"content": ""}]
        for place, delta in enumerate(deltas):
            made.append(self._chunk(delta, logprobs=None if place else self._logprobs(piece)))
        if piece.finish_reason is not None:
            made.append(self._chunk({}, self._reason(piece)))
        return made

    def _deltas(self, said: Said) -> list[dict[str, Any]]:
        """A call's name comes before its arguments, as clients expect."""
        made: list[dict[str, Any]] = []
        if said.reasoning:
            made.append({"reasoning_content": said.reasoning})
        if said.content:
            made.append({"content": said.content})
        first = self._reader.num_calls - len(said.calls)
        for index, call in enumerate(said.calls, first):
            whole = call.to_json()
            arguments = whole["function"].pop("arguments")
            whole["function"]["arguments"] = ""
            made.append({"tool_calls": [{"index": index, **whole}]})
            made.append({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
        return made

    def _chunk(
        self, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }


class CompletionChoice(Choice):
    """echo : what the text begins with."""

    def __init__(self, index: int, spelling: Spelling, body: CompletionRequest, echo: str) -> None:
        super().__init__(index, spelling)
        self._echo = echo
        self._logprobs = None if body.num_logprobs is None else CompletionLogprobs(spelling)

    def whole(self, piece: Piece) -> dict[str, Any]:
        echo, self._echo = self._echo, ""
        return {
            "index": self.index,
            "text": echo + piece.text,
            "logprobs": None if self._logprobs is None else self._logprobs.of(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        return [self.whole(piece)]


class Form:
    """How answers look: a route's JSON, whole or in chunks.

    names : what the id begins with, the kind of object, that of a chunk.
    """

    def __init__(
        self, model: str, names: tuple[str, str, str], choices: list[Choice], include_usage: bool
    ) -> None:
        prefix, self._object, self._chunk_object = names
        self._model, self._choices, self._include_usage = model, choices, include_usage
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @classmethod
    def of_chat(
        cls, model: str, spelling: Spelling, body: ChatRequest, readers: list[Reader]
    ) -> Form:
        """readers : of each answer."""
        names = ("chatcmpl", "chat.completion", "chat.completion.chunk")
        choices: list[Choice] = [
            ChatChoice(index, spelling, body, reader) for index, reader in enumerate(readers)
        ]
        return cls(model, names, choices, body.include_usage)

    @classmethod
    def of_completion(
        cls, model: str, spelling: Spelling, body: CompletionRequest, echoes: list[str]
    ) -> Form:
        """echoes : what each answer's text begins with."""
        names = ("cmpl", "text_completion", "text_completion")
        choices: list[Choice] = [
            CompletionChoice(index, spelling, body, echo) for index, echo in enumerate(echoes)
        ]
        return cls(model, names, choices, body.include_usage)

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The response of a request that does not stream."""
        made = zip(self._choices, await answers.whole(), strict=True)
        choices = [choice.whole(piece) for choice, piece in made]
        return self._frame(self._object, choices, usage=answers.usage)

    async def events(self, answers: Answers) -> AsyncIterator[str]:
        """Server-sent events, [DONE] last."""
        nothing_yet = {"usage": None} if self._include_usage else {}
        async with aclosing(answers.pieces()) as pieces:  # type: ignore[type-var]
            async for index, piece in pieces:
                for chunk in self._choices[index].chunks(piece):
                    yield event(self._frame(self._chunk_object, [chunk], **nothing_yet))
        if self._include_usage:
            yield event(self._frame(self._chunk_object, [], usage=answers.usage))
        yield _DONE

    @staticmethod
    def failed(message: str) -> str:
        """The end of a stream that broke."""
        return event(error_body(message, "server_error")) + _DONE
