"""Tools of a chat request: who may be called, and the grammar of calls."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from llguidance import LLMatcher
from pydantic import BaseModel, Field, StrictBool, StrictStr

from ktk.generate.engine import RequestError
from ktk.generate.grammar import Form
from ktk.integration.transformers.replies import ReplyStyle
from ktk.server.calls import CallGrammar, Function, UnenforceableError
from ktk.server.schemas import resolved, types

ANY_ARGUMENTS = {"type": "object"}


class FunctionRow(BaseModel):
    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: FunctionRow

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

    def for_parser(self) -> list[dict[str, Any]]:
        """Of each argument its types alone, wherever the schema says them."""
        made = []
        for tool in self.tools:
            root = tool.function.parameters or {}
            found = resolved(root, root).get("properties")
            own = {
                key: {"type": types(schema, root)}
                for key, schema in (found if isinstance(found, dict) else {}).items()
            }
            function = {"name": tool.function.name, "parameters": {"properties": own}}
            made.append({"type": "function", "function": function})
        return made

    def form(self, style: ReplyStyle, special: dict[str, int], is_open: bool) -> Form | None:
        """Of answers whose calls always parse; None where nothing is enforced.

        special : text -> id of the tokens that are no text to a grammar. is_open : the prompt began
        the model's reasoning.

        Raises RequestError if calls are required, or strict, and cannot be enforced.
        """
        if style.format is None:
            if self.choice == "required":
                raise RequestError(
                    "tool_choice: calls cannot be forced in this model's format; use auto",
                    "tool_choice",
                )
            return None
        functions = [
            Function(one.function.name, _arguments(one.function), bool(one.function.strict))
            for one in self.tools
        ]
        grammar = CallGrammar(
            style.format, functions, self.is_parallel, special, style.thinks, is_open
        )
        try:
            text = grammar.required() if self.choice == "required" else grammar.free()
        except UnenforceableError as error:
            raise RequestError(f"tools: not all can be strict: {error}", "tools") from error
        return None if text is None else Form("grammar", text)


def _arguments(function: FunctionRow) -> dict[str, Any]:
    """The schema, or that of any object where it cannot be enforced."""
    schema = function.parameters or ANY_ARGUMENTS
    options: Any = {"lenient": not function.strict}
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        why = LLMatcher.validate_grammar(grammar)
    except ValueError as error:  # nested too deeply to be read at all
        why = str(error)
    if not why or why.startswith("WARNING"):
        return schema
    if function.strict:
        raise RequestError(f"tools: {function.name} cannot be strict: {why:.300}", "tools")
    return ANY_ARGUMENTS
