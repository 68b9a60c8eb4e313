"""/v1/messages and /v1/responses, by Anthropic's and OpenAI's own clients: what they answer is what
a chat completion answers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from ktk.generate.engine import Limits
from ktk.generate.open import OpenModel
from ktk.generate.trial import start_engine
from ktk.server.app import Access, build_app

httpx = pytest.importorskip("httpx2")
anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

KEY = "s3cret"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
ASKED: dict[str, Any] = {"model": "tiny-moe", "temperature": 0}
# Anthropic's client knows no temperature any more, the API does.
GREEDY: dict[str, Any] = {"model": "tiny-moe", "extra_body": {"temperature": 0}}
RAIN = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def app(opened: OpenModel) -> Iterator[Any]:
    engine = start_engine(opened, Limits(context=512, running=4))
    yield build_app(opened, engine, Access(api_key=KEY))
    engine.stop()


def with_clients(app: Any, work: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """work : of Anthropic's and OpenAI's client."""

    async def run() -> Any:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ktk")
        options: dict[str, Any] = {"http_client": http, "api_key": KEY, "max_retries": 0}
        return await work(
            anthropic.AsyncAnthropic(base_url="http://ktk", **options),
            openai.AsyncOpenAI(base_url="http://ktk/v1", **options),
        )

    return asyncio.run(run())


def test_a_plain_answer_is_that_of_a_chat_completion(app: Any) -> None:
    system = [{"role": "system", "content": "Be brief."}]

    async def work(messages: Any, client: Any) -> None:
        chat = await client.chat.completions.create(
            messages=[*system, *RAIN], max_tokens=12, **ASKED
        )
        want = chat.choices[0].message.content
        asked = {"messages": RAIN, "system": "Be brief.", "max_tokens": 12, **GREEDY}
        message = await messages.messages.create(**asked)
        assert [(block.type, block.text) for block in message.content] == [("text", want)]
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 12)
        assert message.usage.input_tokens == chat.usage.prompt_tokens
        async with messages.messages.stream(**asked) as stream:
            text = "".join([part async for part in stream.text_stream])
            last = await stream.get_final_message()
        assert text == want == last.content[0].text
        assert last.stop_reason == "max_tokens" and last.usage.output_tokens == 12
        count = await messages.messages.count_tokens(
            model="tiny-moe", messages=RAIN, system="Be brief."
        )
        assert count.input_tokens == chat.usage.prompt_tokens

        own = {"input": "Rain?", "instructions": "Be brief.", "max_output_tokens": 12, **ASKED}
        response = await client.responses.create(**own)
        assert response.output_text == want and response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage.input_tokens == chat.usage.prompt_tokens
        streamed = [event async for event in await client.responses.create(**own, stream=True)]
        kinds = [event.type for event in streamed]
        assert [event.sequence_number for event in streamed] == list(range(len(streamed)))
        assert streamed[-1].response.output_text == want
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-3:] == [
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]

    with_clients(app, work)


def test_messages_call_tools_and_take_results(app: Any, says: Any) -> None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    asked = {"messages": RAIN, "tools": tools, "max_tokens": 200, **GREEDY}

    async def work(client: Any, _: Any) -> None:
        says("Let me see.\n" + CALL)
        message = await client.messages.create(**asked)
        text, call = message.content
        assert (text.text, call.name, call.input) == ("Let me see.", "weather", {"city": "Bonn"})
        assert message.stop_reason == "tool_use"
        async with client.messages.stream(**asked) as stream:
            last = await stream.get_final_message()
        assert [block.type for block in last.content] == ["text", "tool_use"]
        assert last.content[1].input == {"city": "Bonn"} and last.stop_reason == "tool_use"
        says("12 degrees. Bye")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "12 degrees"}
        history = [
            *RAIN,
            {"role": "assistant", "content": message.model_dump()["content"]},
            {"role": "user", "content": [result]},
        ]
        more = {**asked, "messages": history, "tool_choice": {"type": "none"}}
        message = await client.messages.create(**more, stop_sequences=[" Bye"])
        assert message.content[0].text == "12 degrees."
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " Bye")

    with_clients(app, work)


def test_responses_call_tools_and_take_results(app: Any, says: Any) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": None}]
    asked = {"input": RAIN, "tools": tools, **ASKED}

    async def work(_: Any, client: Any) -> None:
        says("Let me see.\n" + CALL)
        response = await client.responses.create(**asked)
        text, call = response.output
        assert (text.type, response.output_text) == ("message", "Let me see.")
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Bonn"})
        assert response.status == "completed"
        async with client.responses.stream(**asked) as events:
            kinds = [event.type async for event in events]
            final = await events.get_final_response()
        assert [item.type for item in final.output] == ["message", "function_call"]
        assert json.loads(final.output[1].arguments) == {"city": "Bonn"}
        assert "response.function_call_arguments.done" in kinds
        says("12 degrees.")
        history = [
            *RAIN,
            *(item.model_dump(exclude_none=True) for item in response.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"},
        ]
        last = await client.responses.create(**{**asked, "input": history})
        assert last.output_text == "12 degrees."

    with_clients(app, work)


def test_forms_of_responses_are_enforced(app: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "x", "schema": {**schema, "additionalProperties": False}}

    async def work(_: Any, client: Any) -> None:
        made = await client.responses.create(input="?", text={"format": form}, **ASKED)
        assert isinstance(json.loads(made.output_text)["a"], bool)

    with_clients(app, work)


def test_what_is_not_served_is_400_and_keys_are_asked_for(app: Any) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "x"}}

    async def work(messages: Any, client: Any) -> None:
        wrong: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": [image]}]},
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            {"extra_body": {"nonsense": 1}},
        ]
        for more in wrong:
            with pytest.raises(anthropic.BadRequestError):
                await messages.messages.create(
                    **{"messages": RAIN, "max_tokens": 5, **GREEDY, **more}
                )
        for more in (
            {"previous_response_id": "resp_1"},
            {"store": True},
            {"input": [{"type": "computer_call"}]},
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            {"tools": [{"type": "web_search"}]},
        ):
            with pytest.raises(openai.BadRequestError):
                await client.responses.create(**{"input": "Rain?", **ASKED, **more})
        messages.api_key = "wrong"
        with pytest.raises(anthropic.AuthenticationError):
            await messages.messages.create(messages=RAIN, max_tokens=5, **GREEDY)

    with_clients(app, work)
