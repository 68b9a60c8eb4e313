"""`ktk serve` as its clients meet it: curl, OpenAI's Python client, and clients that misbehave."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from ktk.cli import main
from make.serving import Server, make_model, serving

for needed in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
openai = pytest.importorskip("openai")

CONTEXT = 8192


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "tiny-moe")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving(model, "--context", str(CONTEXT), "--max-requests", "8") as running:
        yield running
        assert running.end(signal.SIGINT) == 0


@pytest.fixture(scope="module")
def keyed(model: Path) -> Iterator[Server]:
    with serving(model, "--context", "16384", key="s3cret") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def question(text: str = "Why?") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- OpenAI's client ------------------------------------------------------------------------------


def test_models_lists_the_model(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["tiny-moe"]
    assert client.models.retrieve("tiny-moe").id == "tiny-moe"
    with pytest.raises(openai.NotFoundError, match="only 'tiny-moe' is"):
        client.models.retrieve("gpt-4")


def test_chat_streams_the_text_that_it_gives_whole(client: Any) -> None:
    asked = {"messages": question(), "temperature": 0, "max_tokens": 40, "model": "tiny-moe"}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage and whole.usage.completion_tokens == 40
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 40
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 20 and sum(bool(c.choices) for c in chunks) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {chunks[0].id} != {whole.id}


def test_completions_from_text_and_tokens_agree(client: Any, model: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)("The experts of")["input_ids"]
    made = [
        client.completions.create(model="tiny-moe", prompt=p, temperature=0, max_tokens=12)
        for p in ("The experts of", ids, ["The experts of"])
    ]
    assert len({m.choices[0].text for m in made}) == 1
    assert made[0].usage and made[0].usage.prompt_tokens == len(ids)
    short = client.completions.create(model="tiny-moe", prompt="The", temperature=0)
    assert short.usage and short.usage.completion_tokens == 16
    streamed = client.completions.create(
        model="tiny-moe", prompt="The experts of", temperature=0, max_tokens=12, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed) == made[0].choices[0].text


def test_greedy_text_is_that_of_transformers(client: Any, model: Path) -> None:
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
    got = client.completions.create(
        model="tiny-moe", prompt="The experts of a mixture", temperature=0, max_tokens=60
    )
    assert got.choices[0].text == opened.tokenizer.decode(want, skip_special_tokens=True)


def test_seeds_repeat_and_differ(client: Any) -> None:
    def text(seed: int, **more: Any) -> str:
        made = client.completions.create(
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


def test_stop_strings_end_the_text_before_them(client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny-moe", "messages": question(), "temperature": 0}
    full = client.chat.completions.create(**asked, max_tokens=60).choices[0].message.content
    assert full
    stop = full[20:24]
    want = full[: full.index(stop)]
    made = client.chat.completions.create(**asked, max_tokens=60, stop=[stop, "never there"])
    assert made.choices[0].message.content == want
    assert made.choices[0].finish_reason == "stop"
    assert made.usage and made.usage.completion_tokens < 60
    chunks = client.chat.completions.create(**asked, max_tokens=60, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == want


def test_logprobs_are_those_of_the_model(client: Any, model: Path) -> None:
    """Against a plain forward pass of the same int8 model: 1e-3 nats,
    which is float32 through two layers.
    """
    import torch

    from ktk.generate.open import open_model

    opened = open_model(model)
    got = client.completions.create(
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
    chat = client.chat.completions.create(
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


def test_openais_client_parses_models_of_pydantic_and_calls_tools_in_a_loop(client: Any) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: Annotated[str, Field(max_length=8)]
        age: int

    asked: dict[str, Any] = {"model": "tiny-moe", "max_tokens": 200, "temperature": 1.0}
    made = client.chat.completions.parse(
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
    with client.chat.completions.stream(
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
    last = client.chat.completions.create(
        messages=messages, tool_choice="none", **(asked | {"max_tokens": 5})
    )
    assert last.choices[0].finish_reason == "length" and last.choices[0].message.content


def test_messages_may_have_parts_and_developer_roles(client: Any) -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    asked: dict[str, Any] = {"model": "tiny-moe", "temperature": 0, "max_tokens": 8}
    plain, developer = (
        client.chat.completions.create(
            messages=[{"role": role, "content": "Be brief."}, {"role": "user", "content": content}],
            **asked,
        )
        for role, content in (("system", "Why?"), ("developer", parts))
    )
    assert plain.choices[0].message == developer.choices[0].message


# --- curl -----------------------------------------------------------------------------------------


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

    before = {
        n: value(n)
        for n in (
            "ktk_generated_tokens_total",
            "ktk_prompt_tokens_total",
            "ktk_request_seconds_count",
        )
    }
    done = server.request("/v1/completions", {"prompt": "The", "max_tokens": 9, "temperature": 0})[
        1
    ]
    after = {n: value(n) for n in before}
    grown = {n: after[n] - before[n] for n in before}
    assert grown["ktk_generated_tokens_total"] == 9
    assert grown["ktk_prompt_tokens_total"] == done["usage"]["prompt_tokens"]
    assert grown["ktk_request_seconds_count"] == 1
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


# --- what is refused ------------------------------------------------------------------------------

WRONG = {
    "messages missing": ({}, "messages"),
    "messages empty": ({"messages": []}, "messages"),
    "messages a string": ({"messages": "hi"}, "messages"),
    "role unknown": ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    "content a number": ({"messages": [{"role": "user", "content": 3}]}, "content"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    "temperature a string": ({"messages": question(), "temperature": "hot"}, "temperature"),
    "temperature too high": ({"messages": question(), "temperature": 3}, "temperature"),
    "top_p zero": ({"messages": question(), "top_p": 0}, "top_p"),
    "max_tokens zero": ({"messages": question(), "max_tokens": 0}, "max_tokens"),
    "max_tokens a float": ({"messages": question(), "max_tokens": 2.5}, "max_tokens"),
    "max_tokens a bool": ({"messages": question(), "max_tokens": True}, "max_tokens"),
    "stream a string": ({"messages": question(), "stream": "yes"}, "stream"),
    "stop a number": ({"messages": question(), "stop": 5}, "stop"),
    "stop empty": ({"messages": question(), "stop": [""]}, "stop"),
    "seed huge": ({"messages": question(), "seed": 2**70}, "seed"),
    "half a character": ({"messages": question("a\ud800")}, "\\ud800, at character 1"),
    "content null": (
        {"messages": [*question(), {"role": "assistant", "content": None}]},
        "messages.1: content is null or missing",
    ),
    "content missing": ({"messages": [{"role": "assistant"}]}, "messages.0: content is null"),
    "n too many": ({"messages": question(), "n": 65}, "n: "),
    "tools": ({"messages": question(), "tools": [{"type": "function"}]}, "tools"),
    "top_logprobs alone": ({"messages": question(), "top_logprobs": 3}, "logprobs: true"),
    "a list": ([], "JSON object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_400_and_say_what_is_wrong(server: Server, name: str) -> None:
    body, says = WRONG[name]
    status, answer = server.request("/v1/chat/completions", body)
    assert status == 400, answer
    assert says in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"messages": [', b"\xff\xfe", b"null", b"[" * 100_000], ids=repr
)
def test_malformed_json_is_400(server: Server, body: bytes) -> None:
    status, answer = server.request("/v1/chat/completions", body)
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_completions_refuse_wrong_prompts(server: Server) -> None:
    for more, says in (
        ({"prompt": [10**9]}, "1000000000"),
        ({"prompt": [-1]}, "-1"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "0 texts"),
        ({"prompt": "\ud800"}, "\\ud800"),
    ):
        status, answer = server.request("/v1/completions", {"prompt": "a", **more})
        assert (status, says in answer["error"]["message"]) == (400, True), answer


def test_another_model_is_404(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="only 'tiny-moe' is"):
        client.completions.create(model="gpt-4", prompt="x")


def test_a_prompt_of_100000_tokens_is_400_with_both_figures(client: Any) -> None:
    with pytest.raises(
        openai.BadRequestError, match=rf"has 100000 tokens.*context is {CONTEXT} tok"
    ):
        client.completions.create(model="tiny-moe", prompt=[5] * 100_000, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match=rf"prompt has \d{{6}} tokens.*{CONTEXT}"):
        client.chat.completions.create(model="tiny-moe", messages=question("xq " * 100_000))  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match=r"together 8193.*at most 8182"):
        client.completions.create(model="tiny-moe", prompt=[5] * 10, max_tokens=8183)


def test_a_prompt_that_just_fits_is_answered(client: Any) -> None:
    made = client.completions.create(model="tiny-moe", prompt=[5] * (CONTEXT - 2), max_tokens=2)
    assert made.usage and made.usage.total_tokens == CONTEXT


def test_other_hosts_and_large_bodies_are_refused(server: Server) -> None:
    status, _ = server.request("/v1/models", headers={"host": "evil.example"})
    assert status == 400  # a web page whose name was pointed at 127.0.0.1
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(head + b"Content-Length: 9000000\r\n\r\n")
        answer = raw.recv(4096)
        while b"}" not in answer and (more := raw.recv(4096)):
            answer += more
    assert answer.startswith(b"HTTP/1.1 413") and b"8388608" in answer
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:  # no length
        raw.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = b""
        try:
            for _ in range(10):
                raw.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        except OSError:  # it has hung up already
            pass
        while b"\r\n" not in answer and (more := raw.recv(4096)):
            answer += more
    assert answer.startswith(b"HTTP/1.1 413")


# --- many clients, and bad ones -------------------------------------------------------------------


def test_sixteen_concurrent_greedy_answers_equal_those_alone(server: Server) -> None:
    """Bit by bit, log probabilities too; prompts of 3 to 1500 tokens,
    cut into chunks wherever the others leave room.
    """
    prompts = [[3 + (7 * i + j) % 300 for j in range(3 + 100 * i)] for i in range(16)]

    def text(prompt: list[int]) -> tuple[str, tuple[float, ...]]:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, "logprobs": 0}
        status, answer = server.request("/v1/completions", body)
        assert status == 200, answer
        choice = answer["choices"][0]
        return choice["text"], tuple(choice["logprobs"]["token_logprobs"])

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(text, prompts))
    assert server.info()["largest_batch"] == 8  # --max-requests
    assert [text(prompt) for prompt in prompts] == together
    assert len(set(together)) > 8
    server.settle()


def open_stream(server: Server, max_tokens: int, waits: bool = True) -> socket.socket:
    """A socket on which a stream of the given length was asked for, and has begun if ``waits``."""
    body = json.dumps({"prompt": "The", "max_tokens": max_tokens, "stream": True, "temperature": 0})
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        f"application/json\r\nContent-Length: {len(body)}\r\n"
    )
    key = f"Authorization: Bearer {server.key}\r\n" if server.key else ""
    raw.sendall(f"{head}{key}\r\n{body}".encode())
    got = b""
    while waits and b"data: " not in got:
        more = raw.recv(4096)
        assert more, got
        got += more
    assert not waits or got.startswith(b"HTTP/1.1 200")
    return raw


def test_cancelled_streams_stop_the_generation_and_free_their_pages(server: Server) -> None:
    streams = [open_stream(server, 8000) for _ in range(8)]
    streams += [open_stream(server, 8000, waits=False) for _ in range(4)]
    end = time.monotonic() + 10
    while server.info()["requests_waiting"] < 4:
        assert time.monotonic() < end, server.info()
        time.sleep(0.02)
    assert server.info()["requests_running"] == 8
    for stream in streams:
        stream.close()
    start = time.monotonic()
    server.settle()
    assert time.monotonic() - start < 10  # 8000 tokens would take much longer


def test_a_client_that_leaves_before_a_whole_answer_frees_its_pages(server: Server) -> None:
    body = json.dumps({"prompt": "The", "max_tokens": 8000, "temperature": 0}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            (
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                b"application/json\r\n"
            )
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        while server.info()["requests_running"] == 0:
            time.sleep(0.02)
    server.settle()


def test_slow_readers_hold_up_nobody(server: Server) -> None:
    slow = [open_stream(server, 4000) for _ in range(3)]  # and nobody reads on
    try:
        for _ in range(3):
            start = time.monotonic()
            status, _ = server.request("/v1/completions", {"prompt": "The", "max_tokens": 8})
            assert status == 200 and time.monotonic() - start < 10
    finally:
        for stream in slow:
            stream.close()
    server.settle()


def test_many_cancelled_requests_leak_nothing(server: Server) -> None:
    def round_of(count: int) -> None:
        streams = [open_stream(server, 6000) for _ in range(count)]
        for stream in streams:
            stream.close()
        server.settle()

    for _ in range(3):
        round_of(8)
    before = server.memory()
    for _ in range(8):
        round_of(8)
    assert (
        server.memory() - before < 24 << 20
    )  # the allocator's; a kept request would hold its pages, too


# --- the end, keys, options -----------------------------------------------------------------------


def test_a_key_is_asked_for_everywhere_but_on_the_page(keyed: Server) -> None:
    for path in ("/v1/models", "/v1/ktk", "/metrics", "/v1/chat/completions", "/nope"):
        for given in ("", "Bearer wrong", "Bearer s3cre", "Basic s3cret"):
            status, answer = keyed.request(path, headers={"authorization": given})
            assert status == 401, (path, given)
            assert answer["error"]["code"] == "invalid_api_key"
    for path in ("/", "/health"):
        assert keyed.request(path, headers={"authorization": ""})[0] == 200
    good = openai.OpenAI(base_url=keyed.url + "/v1", api_key="s3cret", max_retries=0)
    assert [m.id for m in good.models.list()] == ["tiny-moe"]
    bad = openai.OpenAI(base_url=keyed.url + "/v1", api_key="s3cretx", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        bad.models.list()


def test_sigterm_ends_streams_with_a_last_chunk_and_exit_code_0(keyed: Server) -> None:
    """The last test of that server."""
    stream = open_stream(keyed, 16000)
    start = time.monotonic()
    code: list[int] = []
    ender = threading.Thread(target=lambda: code.append(keyed.end(signal.SIGTERM)))
    ender.start()
    got = b""
    while more := stream.recv(65536):
        got += more
    ender.join()
    assert code == [0]
    assert time.monotonic() - start < 10
    last = [e for e in got.decode().split("\n\n") if "data: " in e]
    assert last[-1].endswith("data: [DONE]")
    assert '"finish_reason":"length"' in last[-2]
    stream.close()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of `ktk serve`, in this process: it must end before it serves."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    return int(str(ended.value.code)), capsys.readouterr().err


def test_other_addresses_need_a_key(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "example.invalid"):
        code, says = refusal(capsys, str(model), "--host", host)
        assert code == 2 and "--no-auth" in says and "KTK_API_KEY" in says
    assert refusal(capsys, str(model), "--no-auth", "--api-key", "x")[0] == 2


def test_a_taken_port_and_a_small_cache_are_one_line(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, says = refusal(capsys, str(model), "--port", str(taken.getsockname()[1]))
    assert code == 1 and "choose another --port" in says and says.count("\n") == 1
    code, says = refusal(capsys, str(model), "--host", "no.invalid", "--no-auth")
    assert code == 1 and "--host no.invalid" in says and says.count("\n") == 1
    code, says = refusal(capsys, "no/such/model", "--port", "0")
    assert code == 1 and "no such file" in says and says.count("\n") == 1
    small = ("--port", "0", "--context", "32768", "--kv-cache", "0.001")
    code, says = refusal(capsys, str(model), *small)
    assert code == 1 and "--context" in says and says.count("\n") == 1


def test_the_cache_holds_one_context_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 caches 5 MB a token, so 2 GB would not hold 8192 tokens."""
    from ktk.cli.serve import cache_bytes
    from ktk.kv.sizes import SERVER_CACHE
    from ktk.machine import cpu

    monkeypatch.setattr(cpu, "memory", lambda *_: (64 << 30, 40 << 30))
    assert cache_bytes(None, None, 10 << 20, False) == (SERVER_CACHE, SERVER_CACHE // 4)
    assert cache_bytes(None, 0, 16 << 30, False) == (20 << 30, 0)
    assert cache_bytes(None, 3, 60 << 30, True) == (40 << 30, 3 << 30)
    assert cache_bytes(1.0, None, 16 << 30, False) == (1 << 30, 1 << 28)
    with pytest.raises(MemoryError, match="--kv-cache 41"):
        cache_bytes(41, None, 16 << 30, False)


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
