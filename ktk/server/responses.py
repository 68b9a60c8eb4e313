"""OpenAI's Responses API, as far as chat completions have what it asks for: /v1/responses, whole
and as events. Responses are not kept.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from ktk.server.answer import Answers
from ktk.server.connection import Respond
from ktk.server.message import Reader, Said, parts
from ktk.server.protocol import ChatRequest, Count
from ktk.server.service import Service, as_chat

_TEXTS = ("input_text", "output_text", "text")


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: dict[str, Any] | None = None


class ResponsesRequest(BaseModel):
    """POST /v1/responses. Of what is not named here a request is refused."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    input: StrictStr | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: StrictStr | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: StrictBool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    text: _Text | None = None
    # With values that change nothing.
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[StrictStr], Field(max_length=0)] | None = None
    metadata: dict[str, Any] | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    service_tier: Literal["auto", "default"] | None = None

    def chat(self) -> ChatRequest:
        """The same as a request for a chat completion. Raises RequestError."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        given = self.input
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        for item in given:
            _add(messages, item)
        own = ("model", "stream", "temperature", "top_p", "parallel_tool_calls")
        made = {name: getattr(self, name) for name in own}
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
        return as_chat(
            {
                **made,
                "messages": messages,
                "max_completion_tokens": self.max_output_tokens,
                "tools": None if self.tools is None else list(map(_nested, self.tools)),
                "tool_choice": choice,
                "response_format": self._format(),
            }
        )

    def _format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text is not None else None
        if form is None or form.get("type") != "json_schema":
            return form
        return {"type": "json_schema", "json_schema": {k: form[k] for k in form if k != "type"}}


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in tool.items() if name != "type"}
    return {"type": tool.get("type"), "function": own}


def _add(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Calls, which are items of their own here, belong to the message before."""
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = _text(item.get("output"))
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "message":
        messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
    elif kind != "reasoning":  # of an earlier turn, which models are not shown
        messages.append({"role": f"an item of type {kind}", "content": ""})


def _text(content: Any) -> Any:
    """Parts in one piece; what is no text as it is, for the request to refuse."""
    if not isinstance(content, list):
        return content
    if all(isinstance(one, dict) and one.get("type") in _TEXTS for one in content):
        return "".join(str(one.get("text", "")) for one in content)
    return content


class _Reply:
    """An answer as a response of that API."""

    def __init__(self, model: str, body: ResponsesRequest, answers: Answers) -> None:
        self._answers = answers
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "store": False,
        }

    def _end(self, reason: str) -> dict[str, Any]:
        usage = self._answers.usage
        is_cut = reason == "length"
        return {
            **self._response,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    async def whole(self, reader: Reader) -> dict[str, Any]:
        reason = ""
        async for said, piece in parts(self._answers, reader):
            for item, text in _items(said):
                self._append(item, text)
            reason = piece.finish_reason or reason
        return self._end(reason)

    def _append(self, item: dict[str, Any], text: str) -> bool:
        """Whether that began an item of the output."""
        last = self._output[-1] if self._output else None
        is_new = last is None or last["type"] != item["type"] or item["type"] == "function_call"
        if is_new:
            self._output.append(item)
        self._put(text)
        return is_new

    def _put(self, text: str) -> None:
        item = self._output[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
        else:
            item["content"][0]["text"] += text

    def _event(self, kind: str, **more: Any) -> str:
        value = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"

    async def events(self, reader: Reader) -> AsyncIterator[str]:
        reason, has_begun = "", False
        async for said, piece in parts(self._answers, reader):
            if not has_begun:
                has_begun = True
                start = {**self._response, "output": []}
                yield self._event("response.created", response=start)
                yield self._event("response.in_progress", response=start)
            for item, text in _items(said):
                async for event in self._added(item, text):
                    yield event
            reason = piece.finish_reason or reason
        for event in self._finished():
            yield event
        end = self._end(reason)
        yield self._event(f"response.{end['status']}", response=end)

    async def _added(self, item: dict[str, Any], text: str) -> AsyncIterator[str]:
        before = len(self._output)
        place = {"output_index": before}
        last = self._output[-1] if self._output else None
        if last is None or last["type"] != item["type"] or item["type"] == "function_call":
            for event in self._finished():
                yield event
            empty = {**item, "status": "in_progress"}
            if item["type"] != "function_call":
                empty["content"] = []
            yield self._event("response.output_item.added", item=empty, **place)
            if item["type"] != "function_call":
                part = dict(item["content"][0])
                where = {"item_id": item["id"], "content_index": 0, **place}
                yield self._event("response.content_part.added", part=part, **where)
        self._append(item, text)
        yield self._event(f"{self._name()}.delta", delta=text, **self._where())

    def _name(self) -> str:
        kinds = {
            "message": "response.output_text",
            "reasoning": "response.reasoning_text",
            "function_call": "response.function_call_arguments",
        }
        return kinds[self._output[-1]["type"]]

    def _where(self) -> dict[str, Any]:
        item = self._output[-1]
        where = {"item_id": item["id"], "output_index": len(self._output) - 1}
        if item["type"] == "function_call":
            return where
        return {**where, "content_index": 0} | (
            {"logprobs": []} if item["type"] == "message" else {}
        )

    def _finished(self) -> list[str]:
        """Of the output's last item."""
        if not self._output:
            return []
        item, where = self._output[-1], self._where()
        made = []
        if item["type"] == "function_call":
            own = {"name": item["name"], "arguments": item["arguments"]}
            made.append(self._event(f"{self._name()}.done", **own, **where))
        else:
            part = item["content"][0]
            made.append(self._event(f"{self._name()}.done", text=part["text"], **where))
            where.pop("logprobs", None)
            made.append(self._event("response.content_part.done", part=part, **where))
        place = {"output_index": len(self._output) - 1}
        made.append(self._event("response.output_item.done", item=item, **place))
        return made


def _items(said: Said) -> list[tuple[dict[str, Any], str]]:
    """(an item of the output, empty, and what comes into it)."""

    def item(kind: str, prefix: str, **more: Any) -> dict[str, Any]:
        return {
            "id": f"{prefix}_{uuid.uuid4().hex}",
            "type": kind,
            "status": "completed",
            **more,
        }

    made: list[tuple[dict[str, Any], str]] = []
    if said.reasoning:
        content: list[dict[str, Any]] = [{"type": "reasoning_text", "text": ""}]
        made.append((item("reasoning", "rs", summary=[], content=content), said.reasoning))
    if said.content:
        content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        made.append((item("message", "msg", role="assistant", content=content), said.content))
    for call in said.calls:
        own = item("function_call", "fc", call_id=call.id, name=call.name, arguments="")
        made.append((own, call.arguments))
    return made


def failed(message: str) -> str:
    """The last event of a stream that broke."""
    value = {"type": "error", "code": "server_error", "message": message, "param": None}
    return f"event: error\ndata: {json.dumps(value)}\n\n"


def add_routes(app: FastAPI, service: Service, respond: Respond) -> None:
    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        chat = body.chat()
        answers = await service.answers(chat)
        (reader,) = service.readers(chat, answers)
        reply = _Reply(service.opened.name, body, answers)
        if body.stream:
            return await respond(request, None, reply.events(reader), failed)
        return await respond(request, reply.whole(reader), None, failed)
