"""`ktk serve` as its clients meet it: OpenAI's Python client, curl, ktk bench-serve."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from ktk.cli import main
from make.serving import CONTEXT, Server, question

for needed in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
openai = pytest.importorskip("openai")


def test_models_lists_the_model(openai_client: Any) -> None:
    assert [m.id for m in openai_client.models.list()] == ["tiny-moe"]
    assert openai_client.models.retrieve("tiny-moe").id == "tiny-moe"
    with pytest.raises(openai.NotFoundError, match="only 'tiny-moe' is"):
        openai_client.models.retrieve("gpt-4")


def test_chat_streams_the_text_that_it_gives_whole(openai_client: Any) -> None:
    asked = {"messages": question(), "temperature": 0, "max_tokens": 40, "model": "tiny-moe"}
    whole = openai_client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage and whole.usage.completion_tokens == 40
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 40
    chunks = list(
        openai_client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 20 and sum(bool(c.choices) for c in chunks) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {chunks[0].id} != {whole.id}


def test_completions_from_text_and_tokens_agree(openai_client: Any, model: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)("The experts of")["input_ids"]
    made = [
        openai_client.completions.create(model="tiny-moe", prompt=p, temperature=0, max_tokens=12)
        for p in ("The experts of", ids, ["The experts of"])
    ]
    assert len({m.choices[0].text for m in made}) == 1
    assert made[0].usage and made[0].usage.prompt_tokens == len(ids)
    short = openai_client.completions.create(model="tiny-moe", prompt="The", temperature=0)
    assert short.usage and short.usage.completion_tokens == 16
    streamed = openai_client.completions.create(
        model="tiny-moe", prompt="The experts of", temperature=0, max_tokens=12, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed) == made[0].choices[0].text


def test_greedy_text_is_that_of_transformers(openai_client: Any, model: Path) -> None:
    """Beside the same int8 experts in generate(): batching,
    attention by sequence and sampling change nothing.
    """
    import torch

    from ktk.generate.open import open_model

    opened = open_model(model)
    ids = opened.tokenizer("The experts of a mixture", return_tensors="pt")
    made = opened.model.generate(**ids, max_new_tokens=60, do_sample=False)
    want = made[0, ids["input_ids"].shape[1] :]
    assert isinstance(made, torch.Tensor) and len(want) == 60
    got = openai_client.completions.create(
        model="tiny-moe", prompt="The experts of a mixture", temperature=0, max_tokens=60
    )
    assert got.choices[0].text == opened.tokenizer.decode(want, skip_special_tokens=True)


def test_seeds_repeat_and_differ(openai_client: Any) -> None:
    def text(seed: int, **more: Any) -> str:
        made = openai_client.completions.create(
            model="tiny-moe", prompt="The", seed=seed, max_tokens=24, **{"temperature": 1.0, **more}
        )
        return made.choices[0].text

    with ThreadPoolExecutor(6) as pool:  # beside other requests, too
        texts = list(pool.map(text, [1, 1, 1, 2, 3, 4]))
    assert texts[0] == texts[1] == texts[2] == text(1)
    assert len(set(texts)) == 4
    greedy = text(1, temperature=0)
    assert text(5, top_p=1e-6) == greedy == text(6, extra_body={"top_k": 1})
    assert text(1, temperature=2.0) != texts[0]


def test_stop_strings_end_the_text_before_them(openai_client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny-moe", "messages": question(), "temperature": 0}
    full = openai_client.chat.completions.create(**asked, max_tokens=60).choices[0].message.content
    assert full
    stop = full[20:24]
    want = full[: full.index(stop)]
    made = openai_client.chat.completions.create(**asked, max_tokens=60, stop=[stop, "never there"])
    assert made.choices[0].message.content == want
    assert made.choices[0].finish_reason == "stop"
    assert made.usage and made.usage.completion_tokens < 60
    chunks = openai_client.chat.completions.create(**asked, max_tokens=60, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == want


def test_logprobs_are_those_of_the_model(openai_client: Any, model: Path) -> None:
    """Against a plain forward pass of the same int8 model: 1e-3 nats,
    which is float32 through two layers.
    """
    import torch

    from ktk.generate.open import open_model

    opened = open_model(model)
    got = openai_client.completions.create(
        model="tiny-moe", prompt="The experts", temperature=0, max_tokens=5, logprobs=3
    )
    found = got.choices[0].logprobs
    assert (
        found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    )
    prompt = opened.tokenizer("The experts")["input_ids"]
    made = opened.model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logits = opened.model(made).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    want = logits.gather(1, made[0, len(prompt) :, None])[:, 0]
    assert torch.allclose(torch.tensor(found.token_logprobs), want, atol=1e-3)
    for row, top in zip(logits, found.top_logprobs, strict=True):
        assert torch.allclose(
            torch.tensor(sorted(top.values())[::-1]), row.topk(3).values, atol=1e-3
        )
    chat = openai_client.chat.completions.create(
        model="tiny-moe",
        messages=question(),
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and len(content) == 4
    for entry in content:
        assert entry.bytes == list(entry.token.encode()) or entry.token.startswith("bytes:")
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert len(entry.top_logprobs) == 2


def test_openais_client_parses_models_of_pydantic_and_calls_tools_in_a_loop(
    openai_client: Any,
) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: Annotated[str, Field(max_length=8)]
        age: int

    asked: dict[str, Any] = {"model": "tiny-moe", "max_tokens": 200, "temperature": 1.0}
    made = openai_client.chat.completions.parse(
        messages=question("Who?"), response_format=Person, seed=2, **asked
    )
    parsed = made.choices[0].message.parsed
    assert isinstance(parsed, Person) and len(parsed.name) <= 8
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "Rom"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    messages: list[Any] = question("Rain?")
    asked |= {"tools": tools, "parallel_tool_calls": False}
    with openai_client.chat.completions.stream(
        messages=messages, tool_choice="required", seed=3, **asked
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Rom")
    messages += [
        message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    last = openai_client.chat.completions.create(
        messages=messages, tool_choice="none", **(asked | {"max_tokens": 5})
    )
    assert last.choices[0].finish_reason == "length" and last.choices[0].message.content


def test_messages_may_have_parts_and_developer_roles(openai_client: Any) -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    asked: dict[str, Any] = {"model": "tiny-moe", "temperature": 0, "max_tokens": 8}
    plain, developer = (
        openai_client.chat.completions.create(
            messages=[{"role": role, "content": "Be brief."}, {"role": "user", "content": content}],
            **asked,
        )
        for role, content in (("system", "Why?"), ("developer", parts))
    )
    assert plain.choices[0].message == developer.choices[0].message


def curl(*arguments: str) -> str:
    done = subprocess.run(
        ["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_curl_streams_events_that_end_in_done(server: Server) -> None:
    body = json.dumps({"messages": question(), "max_tokens": 4, "stream": True})
    out = curl(
        "-N",
        server.url + "/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    )
    events = out.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_metrics_count_requests_and_tokens(server: Server) -> None:
    def value(name: str) -> float:
        lines = curl(server.url + "/metrics").splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    names = ("generated_tokens_total", "prompt_tokens_total", "request_seconds_count")
    before = {name: value(f"ktk_{name}") for name in names}
    asked = {"prompt": "The", "max_tokens": 9, "temperature": 0}
    _, done = server.request("/v1/completions", asked)
    grown = [value(f"ktk_{name}") - before[name] for name in names]
    assert grown == [9, done["usage"]["prompt_tokens"], 1]
    assert value('ktk_requests_total{route="/v1/completions",status="200"}') >= 1
    assert value("ktk_tokens_per_second") > 0
    assert value("ktk_requests_running") == 0 == value("ktk_requests_waiting")
    assert value("process_resident_memory_bytes") > 1e7


def test_health_and_description(server: Server) -> None:
    assert server.request("/health") == (200, {"status": "ok"})
    found = server.info()
    assert found["model"] == "tiny-moe" and found["context"] == CONTEXT
    assert "int8" in found["kernel"] and found["expert_bytes"] > 0
    paths = {path["name"]: path for path in found["fast_paths"]}
    assert set(paths) == {"fused decode", "batching", "AMX", "repacked", "huge pages"}
    assert all(path["taken"] == (path["reason"] is None) for path in paths.values())
    assert paths["batching"]["taken"], paths["batching"]["reason"]


def test_bench_serve_measures_it(server: Server, tmp_path: Path) -> None:
    report, text = tmp_path / "found.json", tmp_path / "text"
    text.write_text("def add(a, b): return a + b, of which a token uses a few. " * 20)
    options = ["-c", "1,4", "--prompt", "40", "--tokens", "6", "--requests", "1", "--rounds", "1"]
    options += ["--text", str(text)]
    for route in ([], ["--chat"]):
        with pytest.raises(SystemExit) as end:
            main(["bench-serve", server.url, *options, *route, "--json", str(report)])
        assert end.value.code == 0
        found = json.loads(report.read_text())
        assert found["servers"][0]["model"] == "tiny-moe"
        for case, clients in zip(found["cases"], (1, 4), strict=True):
            assert case["concurrency"] == case["requests"] == clients and not case["errors"]
            assert case["output_tokens"] == 6 * clients
            assert 30 <= case["prompt_tokens_counted"] <= 90  # chat: the template's, too
            assert case["ttft_ms"]["median"] > case["tpot_ms"]["median"] > 0
