"""Tools: calls that always parse, told from text and reasoning in the formats that models write,
whole and as they come.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient

from ktk.generate.grammar import Grammars
from ktk.generate.open import OpenModel
from ktk.integration.transformers.replies import ReplyStyle
from ktk.server.message import Reader
from ktk.server.tools import Tool, Tools
from make.serving import make_tokenizer

CHAT = "/v1/chat/completions"
CITY = {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1}}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": CITY,
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
RAIN = {"type": "function", "function": {**WEATHER["function"], "name": "rain"}}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
BONN = ("weather", {"city": "Bonn"})
QUESTION = [{"role": "user", "content": "Rain?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def ask(client: TestClient, **more: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "tools": [WEATHER, TIME], "max_tokens": 400, **more}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def joined(client: TestClient, **more: Any) -> dict[str, Any]:
    """A stream's message, put together as clients do."""
    body = {"messages": QUESTION, "tools": [WEATHER, TIME], "max_tokens": 400, "stream": True}
    lines = client.post(CHAT, json={**body, **more}).text.strip().split("\n\n")
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    end = None
    for line in lines[:-1]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        delta, end = choice["delta"], choice["finish_reason"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(message["tool_calls"]):
                assert part["id"] and part["type"] == "function"
                message["tool_calls"].append(part)
            else:
                own = message["tool_calls"][part["index"]]["function"]
                own["arguments"] += part["function"]["arguments"]
    return {"message": message, "finish_reason": end}


def calls(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    found = (one["function"] for one in choice["message"].get("tool_calls", ()))
    return [(one["name"], json.loads(one["arguments"])) for one in found]


@pytest.mark.parametrize("get", [ask, joined])
def test_calls_are_told_from_text(client: TestClient, says: Any, get: Any) -> None:
    says("Let me see.\n" + TWO)
    made = get(client)
    assert calls(made) == [BONN, ("time", {})]
    assert made["message"]["content"] == "Let me see."
    assert made["finish_reason"] == "tool_calls"
    assert len({one["id"] for one in made["message"]["tool_calls"]}) == 2
    says(TWO)
    made = get(client, parallel_tool_calls=False)
    assert calls(made) == [BONN] and not made["message"]["content"]
    says("No call <b>.")
    made = get(client)
    assert (made["message"]["content"], made["finish_reason"]) == ("No call <b>.", "stop")
    assert not calls(made)
    off = get(client, tool_choice="none")
    assert off["message"]["content"] == "No call <b>."
    says("Hm <tool_call>no</tool_call> so")
    assert get(client)["message"]["content"] == "Hm <tool_call>no</tool_call> so"
    says("See.\n" + CALL)
    cut = get(client, max_tokens=30)
    assert cut["finish_reason"] == "length" and not calls(cut)
    assert ("See.\n" + CALL).startswith(cut["message"]["content"])
    assert "<tool_call>" in cut["message"]["content"]


def test_calls_that_are_forced_parse_whatever_the_tokens(client: TestClient) -> None:
    """A random model at temperature 2."""
    for seed in range(2):
        asked: dict[str, Any] = {"seed": seed, "temperature": 2.0, "tools": [WEATHER, RAIN]}
        asked["parallel_tool_calls"] = False
        made = ask(client, tool_choice="required", **asked)
        ((name, arguments),) = calls(made)
        assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
        assert name in ("weather", "rain") and len(arguments["city"]) <= 6
        named = {"type": "function", "function": {"name": "weather"}}
        ((name, arguments),) = calls(ask(client, tool_choice=named, **asked))
        assert name == "weather" and len(arguments["city"]) <= 6
        assert arguments.get("days", 1) >= 1


def test_a_conversation_with_calls_goes_on(client: TestClient, opened: OpenModel) -> None:
    history = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]
    body = {"messages": history, "tools": [WEATHER], "max_tokens": 3}
    answer = client.post(CHAT, json=body).json()
    text = opened.tokenizer.apply_chat_template(
        [
            *QUESTION,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Bonn"}}}],
            },
            {"role": "tool", "content": "12 degrees"},
        ],
        tools=[WEATHER],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert CALL in text and '"maxLength"' in text
    assert answer["usage"]["prompt_tokens"] == len(opened.tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among the tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"response_format": {"type": "json_object"}}, "not beside tools"),
        ({"messages": [{"role": "tool", "content": None}]}, "content is null"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "a", "strict": True, "parameters": {"not": {}}},
                    }
                ]
            },
            "cannot be strict",
        ),
    ],
)
def test_what_makes_no_sense_is_400(client: TestClient, more: dict[str, Any], says: str) -> None:
    body = {"messages": QUESTION, "tools": [WEATHER], **more}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


def test_a_schema_nested_too_deeply_is_400_where_it_is_strict(client: TestClient) -> None:
    function = {"name": "f", "parameters": nested(130), "strict": True}
    tools = [{"type": "function", "function": function}]
    body = {"messages": QUESTION, "max_tokens": 2, "tools": tools}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 400 and "f cannot be strict" in answer.text
    function["strict"] = False
    assert client.post(CHAT, json=body).status_code == 200


def style_of(template: str) -> ReplyStyle:
    return ReplyStyle(SimpleNamespace(chat_template=template, added_tokens_decoder={}))


def test_reasoning_that_the_prompt_began_is_told_from_the_answer() -> None:
    style = style_of("<think>")
    parser = style.parser("<|im_start|>assistant\n<think>\n", [], False)
    reader = Reader(parser, style.new_id)
    parts = [reader.add(letter) for letter in "So.\n</think>\n\nYes <tool_call>"]
    parts.append(reader.finish())
    assert "".join(part.reasoning for part in parts) == "So.\n"
    assert "".join(part.content for part in parts) == "Yes <tool_call>"
    assert style_of("plain").parser("", [], False) is None


def test_text_beside_calls_is_free_and_calls_in_it_are_not() -> None:
    tools, style = [Tool(**WEATHER), Tool(**TIME)], style_of("tools <tool_call>")
    grammars = Grammars(make_tokenizer(), 384, {2})

    def takes(text: str, choice: str, is_parallel: bool = True) -> bool:
        form = Tools(tools, choice, is_parallel).form(style, {}, False)
        assert form is not None
        matcher = grammars.compile(form).start()._matcher
        ids = make_tokenizer()(text)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert takes("Hello <tool> {", "auto") and not takes("Hello", "required")
    assert takes("Hm. " + TWO, "auto") and takes(TWO, "required")
    assert not takes("Hm. " + TWO, "auto", False) and not takes(TWO, "required", False)
    assert takes("Hm. " + CALL, "auto", False) and takes(CALL, "required", False)
    for wrong in ("<tool_call>\nx", CALL.replace("weather", "other"), CALL.replace("city", "c")):
        assert not takes(wrong, "auto") and not takes(wrong, "required")
