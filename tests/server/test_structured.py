"""Answers have the form that was asked for: whatever the tokens' probabilities, beside others in a
batch, in every engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from make.serving import asking

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient

from ktk.generate.engine import Engine, Limits
from ktk.generate.open import OpenModel
from ktk.generate.sequential import SequentialEngine
from ktk.generate.trial import start_engine

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def sequential(opened: OpenModel, limits: Limits) -> Engine:
    engine = SequentialEngine(opened, limits)
    engine.start()
    return engine


@pytest.fixture(scope="module", params=[start_engine, sequential], ids=["batches", "one by one"])
def client(request: pytest.FixtureRequest, opened: OpenModel) -> Iterator[TestClient]:
    engine = request.param(opened, Limits(context=512, running=8))
    assert engine.why_not_native is None
    yield from asking(opened, engine)


def ask(client: TestClient, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 120, **more}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return {"text": choice["message"]["content"], "end": choice["finish_reason"]}


def check_person(text: str) -> None:
    person = json.loads(text)
    assert set(person) == {"name", "age", "tags"}
    assert len(person["name"]) <= 8 and 0 <= person["age"] <= 150
    assert set(person["tags"]) <= {"a", "b"} and len(person["tags"]) <= 2


def test_any_tokens_make_json_of_the_schema_and_seeds_repeat(client: TestClient) -> None:
    """A random model at temperature 2, four at once, beside one whose form is free."""
    asked: list[dict[str, Any]] = [
        {"temperature": 2.0, "seed": seed, "response_format": SCHEMA} for seed in range(4)
    ]
    asked.append({"temperature": 0, "max_tokens": 20})
    with ThreadPoolExecutor(5) as pool:
        *persons, free = pool.map(lambda one: ask(client, **one), asked)
    for person in persons:
        assert person["end"] == "stop"
        check_person(person["text"])
    assert len({person["text"] for person in persons}) > 2
    assert ask(client, **asked[2]) == persons[2]
    assert ask(client, **asked[-1]) == free
    assert ask(client, **asked[0], min_tokens=80)["end"] == "stop"  # what the form leaves wins
    assert ask(client, **(asked[0] | {"max_tokens": 3}))["end"] == "length"


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        ({"response_format": {"type": "json_object"}, "max_tokens": 300, "seed": 3}, r"\{.*\}"),
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"regex": "(yes|no)!"}, "(yes|no)!"),
        ({"structured_outputs": {"choice": ["Zwölf", 'a "b"']}}, 'Zwölf|a "b"'),
        ({"structured_outputs": {"json": {"enum": [1, "two"]}}}, '1|"two"'),
        ({"guided_json": json.dumps({"const": None})}, "null"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'root ::= "a" | "bc"'}, "a|bc"),
        ({"json_schema": {"type": "boolean"}}, "true|false"),
        ({"grammar": 'root ::= "x" [0-9]+ "," | "y"'}, "x[0-9]+,|y"),
        ({"ebnf": 'start: "p" | "q" start?'}, "q*p?"),
    ],
)
def test_every_way_to_ask_for_a_form(
    client: TestClient, more: dict[str, Any], pattern: str
) -> None:
    answer = ask(client, **{"temperature": 1.0, "seed": 1, **more})
    if answer["end"] == "stop":
        assert re.fullmatch(pattern, answer["text"], re.DOTALL), answer
    else:
        assert more.keys() & {"response_format", "ebnf", "grammar"}, answer


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "has no schema"),
        ({"response_format": {"type": "xml"}}, "response_format", "the type 'xml'"),
        ({"guided_json": {"type": "objct"}}, "guided_json", "Invalid type: objct"),
        ({"guided_json": {"not": {"type": "null"}}}, "guided_json", 'Unimplemented keys: ["not"]'),
        ({"guided_json": "{"}, "guided_json", "cannot be enforced"),
        ({"regex": "a("}, "regex", "unclosed group"),
        ({"grammar": "root ::= x"}, "grammar", "Rule 'x' not found"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"regex": "a", "grammar": 'root ::= "b"'}, "grammar", "give one"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "where its form does"),
    ],
)
def test_a_form_that_cannot_be_enforced_is_400_and_says_why(
    client: TestClient, more: dict[str, Any], param: str, says: str
) -> None:
    body = {"messages": [{"role": "user", "content": "Who?"}], **more}
    answer = client.post(CHAT, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"], error
    assert error["param"] == param


def test_schemas_that_are_not_strict_are_enforced_as_far_as_they_can_be(
    client: TestClient,
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "not": {"maxProperties": 0},
    }
    asked: dict[str, Any] = {"name": "x", "schema": schema | {"required": ["a"]}, "strict": False}
    made = ask(
        client,
        temperature=1.0,
        seed=2,
        response_format={"type": "json_schema", "json_schema": asked},
    )
    assert made["end"] == "length" or isinstance(json.loads(made["text"])["a"], int)
