"""Anthropic's Messages API, as far as chat completions have what it asks for: /v1/messages, whole
and as events, and /v1/messages/count_tokens.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from ktk.server.answer import Answers, Piece
from ktk.server.connection import Respond
from ktk.server.message import Reader, Said, parts
from ktk.server.protocol import ChatRequest, Count
from ktk.server.service import Service, as_chat


class _Block(BaseModel):
    type: StrictStr
    text: StrictStr = ""
    thinking: StrictStr = ""
    id: StrictStr = ""
    name: StrictStr = ""
    input: dict[str, Any] = {}
    tool_use_id: StrictStr = ""
    content: StrictStr | list[_Block] | None = None


class _Message(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: StrictStr | list[_Block]


class _Tool(BaseModel):
    name: StrictStr
    input_schema: dict[str, Any]
    description: StrictStr | None = None
    strict: StrictBool | None = None
    type: Literal["custom"] | None = None


class _Choice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None


class CountRequest(BaseModel):
    """POST /v1/messages/count_tokens. Of what is not named here a request is refused."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    messages: Annotated[list[_Message], Field(min_length=1)]
    system: StrictStr | list[_Block] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: dict[Literal["type"], Literal["disabled"]] | None = None

    def chat(self) -> ChatRequest:
        """The same as a request for a chat completion. Raises RequestError."""
        return as_chat(self._fields())

    def _fields(self) -> dict[str, Any]:
        made: dict[str, Any] = {"model": self.model, "messages": []}
        if self.system:
            made["messages"].append({"role": "system", "content": _text(self.system)})
        for message in self.messages:
            made["messages"] += _chat_messages(message)
        if self.tools:
            made["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "parameters": tool.input_schema,
                        "description": tool.description,
                        "strict": tool.strict,
                    },
                }
                for tool in self.tools
            ]
        if (choice := self.tool_choice) is not None:
            named = {"type": "function", "function": {"name": choice.name or ""}}
            kinds: dict[str, Any] = {"any": "required", "tool": named}
            made["tool_choice"] = kinds.get(choice.type, choice.type)
            made["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return made


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Count
    stop_sequences: list[StrictStr] | None = None
    stream: StrictBool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def _fields(self) -> dict[str, Any]:
        own = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        return {
            **super()._fields(),
            **{name: getattr(self, name) for name in own},
            "stop": self.stop_sequences,
        }


def _text(content: str | list[_Block] | None) -> str:
    if isinstance(content, list):
        return "".join(block.text for block in content)
    return content or ""


def _chat_messages(message: _Message) -> list[dict[str, Any]]:
    """Results of tools are messages of their own there, before the rest."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    made: list[dict[str, Any]] = []
    rest: dict[str, Any] = {"role": message.role, "content": ""}
    for block in message.content:
        if block.type == "text":
            rest["content"] += block.text
        elif block.type == "thinking":
            rest["reasoning_content"] = block.thinking
        elif block.type == "tool_use":
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            call = {"id": block.id, "type": "function", "function": function}
            rest.setdefault("tool_calls", []).append(call)
        elif block.type == "tool_result":
            content = _text(block.content)
            made.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        else:
            # Refused by the request that this becomes.
            rest[f"content of type {block.type}"] = True
    if len(rest) > 2 or rest["content"] or not made:
        made.append(rest)
    return made


class _Reply:
    """An answer as a message of that API."""

    def __init__(self, model: str, answers: Answers) -> None:
        self._answers = answers
        self._message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self) -> dict[str, int]:
        usage = self._answers.usage
        return {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
        }

    def _end(self, piece: Piece, reader: Reader) -> dict[str, Any]:
        reason = "end_turn"
        if piece.finish_reason == "length":
            reason = "max_tokens"
        elif piece.stop_string is not None:
            reason = "stop_sequence"
        elif reader.num_calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": piece.stop_string}

    async def whole(self, reader: Reader) -> dict[str, Any]:
        content = self._message["content"]
        async for said, piece in parts(self._answers, reader):
            for block in _blocks(said):
                if content and block["type"] == content[-1]["type"] != "tool_use":
                    content[-1][block["type"]] += block[block["type"]]
                else:
                    content.append(block)
            if piece.finish_reason is not None:
                self._message |= self._end(piece, reader)
        for block in content:
            if block["type"] == "text":  # clients write a block's text into the conversation
                block["text"] = block["text"].rstrip() if reader.num_calls else block["text"]
        return {**self._message, "usage": self._usage()}

    async def events(self, reader: Reader) -> AsyncIterator[str]:
        start = {**self._message, "usage": {**self._usage(), "output_tokens": 0}}
        last, index, has_begun = "", -1, False
        async for said, piece in parts(self._answers, reader):
            if not has_begun:
                has_begun = True
                yield _event("message_start", message=start)
            for block in _blocks(said):
                kind = block["type"]
                if kind != last or kind == "tool_use":
                    if last:
                        yield _event("content_block_stop", index=index)
                    last, index = kind, index + 1
                    empty = {**block, "input": {}} if kind == "tool_use" else {**block, kind: ""}
                    yield _event("content_block_start", index=index, content_block=empty)
                yield _event("content_block_delta", index=index, delta=_delta(block))
            if piece.finish_reason is not None:
                if last:
                    yield _event("content_block_stop", index=index)
                usage = {"output_tokens": self._usage()["output_tokens"]}
                yield _event("message_delta", delta=self._end(piece, reader), usage=usage)
                yield _event("message_stop")


def _blocks(said: Said) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if said.reasoning:
        made.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
    if said.content:
        made.append({"type": "text", "text": said.content})
    for call in said.calls:
        own = {"id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        made.append({"type": "tool_use", **own})
    return made


def _delta(block: dict[str, Any]) -> dict[str, Any]:
    kind = block["type"]
    if kind == "tool_use":
        return {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    return {"type": f"{kind}_delta", kind: block[kind]}


def _event(kind: str, **more: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **more}, ensure_ascii=False)}\n\n"


def failed(message: str) -> str:
    """The last event of a stream that broke."""
    return _event("error", error={"type": "api_error", "message": message})


def add_routes(app: FastAPI, service: Service, respond: Respond) -> None:
    @app.post("/v1/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        chat = body.chat()
        answers = await service.answers(chat)
        (reader,) = service.readers(chat, answers)
        reply = _Reply(service.opened.name, answers)
        if body.stream:
            return await respond(request, None, reply.events(reader), failed)
        return await respond(request, reply.whole(reader), None, failed)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        async def count() -> dict[str, Any]:
            prompts = await asyncio.to_thread(service.encode, body.chat())
            return {"input_tokens": len(prompts[0])}

        return await respond(request, count(), None, failed)
