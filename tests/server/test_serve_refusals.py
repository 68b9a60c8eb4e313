"""What `ktk serve` refuses, and in which words: requests and options."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from ktk.cli import main
from make.serving import CONTEXT, Server, question

for needed in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
openai = pytest.importorskip("openai")


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


def test_another_model_is_404(openai_client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="only 'tiny-moe' is"):
        openai_client.completions.create(model="gpt-4", prompt="x")


def test_a_prompt_of_100000_tokens_is_400_with_both_figures(openai_client: Any) -> None:
    with pytest.raises(
        openai.BadRequestError, match=rf"has 100000 tokens.*context is {CONTEXT} tok"
    ):
        openai_client.completions.create(model="tiny-moe", prompt=[5] * 100_000, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match=rf"prompt has \d{{6}} tokens.*{CONTEXT}"):
        openai_client.chat.completions.create(model="tiny-moe", messages=question("xq " * 100_000))  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match=r"together 8193.*at most 8182"):
        openai_client.completions.create(model="tiny-moe", prompt=[5] * 10, max_tokens=8183)


def test_a_prompt_that_just_fits_is_answered(openai_client: Any) -> None:
    made = openai_client.completions.create(
        model="tiny-moe", prompt=[5] * (CONTEXT - 2), max_tokens=2
    )
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
