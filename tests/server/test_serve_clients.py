"""Many clients at once, clients that leave, do not read or have no key; the end amid a stream."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from make.serving import Server, serving

for needed in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
openai = pytest.importorskip("openai")


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


STREAMS = {  # by route: what is asked, and the field that says how much
    "/v1/completions": ({"prompt": "The"}, "max_tokens"),
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "The"}]}, "max_tokens"),
    "/v1/messages": ({"messages": [{"role": "user", "content": "The"}]}, "max_tokens"),
    "/v1/responses": ({"input": "The"}, "max_output_tokens"),
}


def open_stream(
    server: Server, max_tokens: int, waits: bool = True, route: str = "/v1/completions"
) -> socket.socket:
    """A socket on which a stream of the given length was asked for, and has begun if ``waits``."""
    asked, length = STREAMS[route]
    body = json.dumps({**asked, length: max_tokens, "stream": True, "temperature": 0})
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
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


@pytest.mark.parametrize("route", STREAMS)
def test_who_leaves_a_stream_of_any_route_frees_its_pages_and_counts(
    server: Server, route: str
) -> None:
    def left() -> float:
        _, metrics = server.request("/metrics")
        name = f'ktk_requests_total{{route="{route}",status="499"}} '
        return float((metrics.partition(name)[2] or "0").split()[0])

    before = left()
    stream = open_stream(server, 7000, route=route)
    end = time.monotonic() + 10
    while server.info()["requests_running"] == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    stream.close()
    server.settle()
    while left() != before + 1:
        assert time.monotonic() < end, "it is not counted as one that left"
        time.sleep(0.01)


def test_a_client_that_leaves_before_a_whole_answer_frees_its_pages(server: Server) -> None:
    body = json.dumps({"prompt": "The", "max_tokens": 8000, "temperature": 0}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            + b"Content-Type: application/json\r\n"
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
    # What the allocator keeps; a request that is kept would hold its pages, too.
    assert server.memory() - before < 24 << 20


@pytest.fixture(scope="module")
def keyed(model: Path) -> Iterator[Server]:
    """Ended by its last test."""
    with serving(model, "--context", "16384", key="s3cret") as running:
        yield running


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
