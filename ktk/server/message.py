"""A chat answer's text as it comes, told apart: content, reasoning, calls of tools."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ktk.server.answer import Answers, Piece


@dataclass(frozen=True)
class Call:
    """arguments : JSON."""

    name: str
    arguments: str
    id: str

    def to_json(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass
class Said:
    """What became certain."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


class Reader:
    """parser : of transformers; None: all is content. new_id : of calls that are written without
    one. most_calls : those beyond are left out.
    """

    def __init__(
        self, parser: Any | None, new_id: Callable[[], str], most_calls: int | None = None
    ) -> None:
        self._parser, self._new_id, self._most = parser, new_id, most_calls
        self._held = ""  # what was not given out yet
        self._strips = False  # space between reasoning and content is neither's
        self.num_calls = 0

    def add(self, text: str) -> Said:
        """Letter by letter: what cannot be parsed is then given back as content, and no more."""
        said = Said()
        for place, letter in enumerate(text):
            if self._parser is None:
                self._content(said, text[place:])
                break
            self._held += letter
            try:
                self._take(said, self._parser.feed(letter))
            except (ValueError, KeyError):  # no call, though it began like one
                self._give_up(said)
        return said

    def finish(self) -> Said:
        """What is left at the end."""
        said = Said()
        if self._parser is not None:
            try:
                self._take(said, self._parser.finalize()[1])
            except (ValueError, KeyError):  # cut within a call
                self._give_up(said)
        return said

    def _give_up(self, said: Said) -> None:
        self._parser = None
        self._content(said, self._held)

    def _take(self, said: Said, events: list[dict[str, Any]]) -> None:
        for event in events:
            name, kind = event["field"], event["type"]
            if kind == "region_chunk" and not event["dirty"]:
                self._held = ""
                if name in ("reasoning_content", "thinking", "reasoning"):
                    said.reasoning += event["text"]
                    self._strips = True
                elif name == "content":
                    self._content(said, event["text"])
            elif kind == "region_close" and name == "tool_calls":
                self._held = ""
                value = event["value"]
                for one in value if isinstance(value, list) else [value]:
                    self._call(said, one)

    def _content(self, said: Said, text: str) -> None:
        text = text.lstrip() if self._strips else text
        if text:
            self._strips = False
            said.content += text

    def _call(self, said: Said, value: dict[str, Any]) -> None:
        if self._most is not None and self.num_calls >= self._most:
            return
        own = value["function"]
        arguments = own.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        own_id = value.get("id") or self._new_id()
        said.calls.append(Call(str(own["name"]), arguments, str(own_id)))
        self.num_calls += 1
        self._strips = True


async def parts(answers: Answers, reader: Reader) -> AsyncIterator[tuple[Said, Piece]]:
    """A request's one answer as it comes: what became certain, and the piece that brought it."""
    async with aclosing(answers.pieces()) as pieces:  # type: ignore[type-var]
        async for _, piece in pieces:
            said = reader.add(piece.text)
            if piece.finish_reason is not None:
                rest = reader.finish()
                said.content += rest.content
                said.reasoning += rest.reasoning
                said.calls += rest.calls
            yield said, piece
