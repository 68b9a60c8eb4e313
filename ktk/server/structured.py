"""The form that a request wants its answer to have, as OpenAI's API, vLLM, llama.cpp's server and
SGLang name it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, StrictStr

from ktk.generate.engine import RequestError
from ktk.generate.grammar import Form, Kind

ANY_OBJECT = '{"type": "object"}'
# Field of a request, and of vLLM's structured_outputs -> the form's kind.
_FIELDS: dict[str, Kind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}
_STRUCTURED: dict[str, Kind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}

Schema = dict[str, Any] | bool | StrictStr


class Structured(BaseModel):
    """The fields. ``form`` is what they ask for together."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Schema | None = None
    guided_regex: StrictStr | None = None
    guided_choice: list[StrictStr] | None = None
    guided_grammar: StrictStr | None = None
    json_schema: Schema | None = None
    regex: StrictStr | None = None
    ebnf: StrictStr | None = None
    grammar: StrictStr | None = None

    def form(self) -> tuple[str, Form] | None:
        """(field, what it asks for), or None. Raises RequestError if that is not served, or more
        than one field asks.
        """
        found = [*self._own(), *self._of_response_format(), *self._of_structured_outputs()]
        if len(found) > 1:
            names = " and ".join(name for name, _ in found)
            raise RequestError(f"{names} both give the answer's form: give one", found[1][0])
        return found[0] if found else None

    def _own(self) -> Iterator[tuple[str, Form]]:
        for name, kind in _FIELDS.items():
            value = getattr(self, name)
            if value not in (None, "", []):
                yield name, _form(name, kind, value)

    def _of_response_format(self) -> Iterator[tuple[str, Form]]:
        name, given = "response_format", dict(self.response_format or {"type": "text"})
        kind = given.pop("type", None)
        if kind == "text":
            return
        if kind == "json_schema":
            given = _object(f"{name}.json_schema", given.get("json_schema", given))
        elif kind != "json_object":
            raise RequestError(
                f'{name} has the type {kind!r:.80}: must be "text", "json_object" or "json_schema"',
                name,
            )
        schema = given.get("schema")
        if schema is None:
            if kind == "json_schema":
                raise RequestError(f"{name}.json_schema has no schema: give one", name)
            schema = ANY_OBJECT
        yield name, _form(name, "json_schema", schema, is_lenient=given.get("strict") is False)

    def _of_structured_outputs(self) -> Iterator[tuple[str, Form]]:
        name, given = "structured_outputs", self.structured_outputs
        if given is None:
            return
        asked = {key: value for key, value in given.items() if value not in (None, False)}
        if set(asked) == {"json_object"}:
            yield name, Form("json_schema", ANY_OBJECT)
        elif len(asked) == 1 and (kind := _STRUCTURED.get(next(iter(asked)))):
            yield name, _form(name, kind, next(iter(asked.values())))
        else:
            allowed = ", ".join([*_STRUCTURED, "json_object"])
            raise RequestError(
                f"{name} has {', '.join(asked) or 'nothing'}: must be one of {allowed}", name
            )


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", name.partition(".")[0])
    return value


def _form(name: str, kind: Kind, value: Any, is_lenient: bool = False) -> Form:
    if kind == "json_schema" and not isinstance(value, str):
        return Form(kind, json.dumps(value), is_lenient)
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise RequestError(f"{name}: the choices must be a list of texts", name)
        return Form(kind, json.dumps(value))
    if not isinstance(value, str):
        raise RequestError(f"{name}: a {kind} must be a text", name)
    return Form(kind, value, is_lenient)
