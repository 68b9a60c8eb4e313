"""Tools of a chat request: who may be called, and the grammar of calls."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from llguidance import LLMatcher
from pydantic import BaseModel, Field, StrictBool, StrictStr

from ktk.generate.engine import RequestError
from ktk.generate.grammar import SPACE, Form
from ktk.integration.transformers.replies import THINK, Format, ReplyStyle

ANY_ARGUMENTS = {"type": "object"}


class Function(BaseModel):
    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        own = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": ANY_ARGUMENTS, **own}}


class NamedFunction(BaseModel):
    name: StrictStr


class NamedChoice(BaseModel):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class Tools:
    """Those that an answer may call. choice : "auto" or "required"."""

    def __init__(self, tools: list[Tool], choice: str, is_parallel: bool) -> None:
        self.tools, self.choice, self.is_parallel = tools, choice, is_parallel

    def for_template(self) -> list[dict[str, Any]]:
        return [tool.for_template() for tool in self.tools]

    def form(self, style: ReplyStyle) -> Form | None:
        """Of answers whose calls always parse; None where nothing is enforced.

        Raises RequestError if calls are required and cannot be.
        """
        own = style.format
        if own is None or not own.is_forced:
            if self.choice == "required":
                raise RequestError(
                    "tool_choice: calls cannot be forced in this model's format; use auto",
                    "tool_choice",
                )
            return None
        if self.choice == "required":
            return Form("grammar", self._required(own, style))
        # Without a mark, text that begins like a call may be none; special tokens are no text.
        if not own.begin or own.is_list or THINK["open"] in style.special:
            return None
        return Form("grammar", self._free(own, style))

    def _required(self, own: Format, style: ReplyStyle) -> str:
        begin, end = _literal(own.begin, style), _literal(own.end, style)
        if own.is_list:
            more = ' (", " call)*' if self.is_parallel else ""
            return f'start: {begin} "[" call{more} "]"\ncall: {self._json(own)}\n'
        more = ' ("\\n" call)*' if self.is_parallel and own.begin else ""
        return f"start: call{more}\ncall: {begin} {self._json(own)} {end}\n"

    def _free(self, own: Format, style: ReplyStyle) -> str:
        """Text, in which what begins like a call becomes one."""
        mark, rest = own.begin.strip(), own.begin[len(own.begin.strip()) :]
        head = f"head: TEXT {_literal(mark, style)}"
        if mark not in style.special:
            head = f"head[lazy]: TEXT {json.dumps(mark)}"
        lines = [
            "start: call* tail" if self.is_parallel else "start: call | tail",
            "tail: TEXT",
            head,
            f"call: head {json.dumps(rest)} {self._json(own)} {_literal(own.end, style)}",
            r"TEXT: /(.|\n)*/",
        ]
        return "\n".join(lines) + "\n"

    def _json(self, own: Format) -> str:
        options = [
            {
                "type": "object",
                "properties": {
                    own.name_key: {"const": tool.function.name},
                    own.arguments_key: _arguments(tool.function),
                },
                "required": [own.name_key, own.arguments_key],
                "additionalProperties": False,
            }
            for tool in self.tools
        ]
        schema: dict[str, Any] = {"anyOf": options}
        schema["x-guidance"] = {"whitespace_pattern": SPACE, "lenient": True}
        return f"%json {json.dumps(schema)}"


def _literal(text: str, style: ReplyStyle) -> str:
    """As Lark has it: a special token by its id."""
    if not text:
        return ""
    special = next((one for one in style.special if one and text.startswith(one)), None)
    if special is not None:
        return f"<[{style.special[special]}]> {_literal(text[len(special) :], style)}".strip()
    place = min(
        (p for one in style.special if one and (p := text.find(one)) > 0), default=len(text)
    )
    return f"{json.dumps(text[:place])} {_literal(text[place:], style)}".strip()


def _arguments(function: Function) -> dict[str, Any]:
    """The schema, or that of any object where it cannot be enforced."""
    schema = function.parameters or ANY_ARGUMENTS
    options: Any = {"lenient": not function.strict}
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    why = LLMatcher.validate_grammar(grammar)
    if not why or why.startswith("WARNING"):
        return schema
    if function.strict:
        raise RequestError(f"tools: {function.name} cannot be strict: {why:.300}", "tools")
    return ANY_ARGUMENTS
