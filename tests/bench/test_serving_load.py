"""The figures of ``ktk bench-serve``: exact ones of made-up answers, and those of a server that
waits as long as it is told to.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ktk.bench.serving.client import Client, Sample, ServerError
from ktk.bench.serving.load import Case, Load, Prompts, run_load
from ktk.cli import main
from ktk.cli.bench_serve import named

TEXT = "The quick brown fox jumps over the lazy dog while nobody looks at it. " * 40
FIRST, NEXT, TOKENS = 0.05, 0.01, 8  # seconds before the first token and each other, tokens


class Slow(BaseHTTPRequestHandler):
    """Counts a token for five characters of a prompt; ``server.fails`` says how every third answer
    goes wrong.
    """

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._whole(200, {"data": [{"id": "slow"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        is_chat = self.path == "/v1/chat/completions"
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        usage = {"prompt_tokens": len(prompt) // 5, "completion_tokens": TOKENS}
        if not body.get("stream"):
            self._whole(200, {"usage": usage})
            return
        with self.server.lock:
            self.server.asked += 1
            fails = self.server.fails if self.server.asked % 3 == 0 else ""
        if fails == "busy":
            self._whole(503, {"error": {"message": "too many"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        begin = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        self._event(begin if is_chat else {"choices": [{"text": ""}]})  # which is no token
        for n in range(TOKENS):
            time.sleep(NEXT if n else FIRST)
            if n == 3 and fails == "broken":
                return
            if n == 3 and fails == "told":
                self._event({"error": {"message": "out of memory"}})
                return
            self._event({"choices": [{"delta": {"content": "a"}} if is_chat else {"text": "a"}]})
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _whole(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def slow() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.bodies, server.fails, server.asked, server.lock = [], "", 0, threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_figures_of_known_answers() -> None:
    case = Case("a", 100, 2)
    answers = [Sample(0, 2.0, first=0.1 * n, last=0.1 * n + 0.9, output_tokens=10) for n in (1, 3)]
    case.add([*answers, Sample(0, 0.5, error="HTTP 503: full")])
    case.add([Sample(5, 9.0, first=5.2, last=8.8, output_tokens=10, prompt_tokens=99)])
    found = case.to_json()
    assert found["tokens_per_second_of_rounds"] == [20 / 2, 10 / 4]
    assert found["tokens_per_second"] == pytest.approx(6.25)
    assert found["tokens_per_second_of_a_stream"] == pytest.approx(5)
    assert found["requests"] == 4 and found["errors"] == {"HTTP 503: full": 1}
    assert found["ttft_ms"] == pytest.approx({"median": 200, "p90": 280, "p99": 298})
    assert found["tpot_ms"] == pytest.approx({"median": 100, "p90": 340, "p99": 394})
    alone = Case("a", 1, 1)
    alone.add([Sample(0, 1, first=0.5, last=0.5, output_tokens=1)])
    assert alone.to_json()["tpot_ms"] is None


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_slow_servers_figures_are_its_delays(slow: Any, is_chat: bool) -> None:
    """Never below what it waits; above by what a busy machine adds."""
    client = Client(slow.url + "/v1/", is_chat=is_chat)
    assert client.model == "slow"
    load = Load([40], [1, 3], TOKENS, requests=1, rounds=1)
    for case in run_load({"slow": client}, load, TEXT):
        found = case.to_json()
        assert found["errors"] == {} and found["requests"] == case.concurrency
        assert FIRST * 1e3 <= found["ttft_ms"]["median"] < FIRST * 1e3 + 40
        assert NEXT * 1e3 * 0.9 <= found["tpot_ms"]["median"] < NEXT * 1e3 + 8
        alone = TOKENS / (FIRST + (TOKENS - 1) * NEXT)
        assert alone / 2 < found["tokens_per_second_of_a_stream"] <= alone
        assert case.concurrency * alone / 2 < found["tokens_per_second"] <= 3 * alone
        assert found["prompt_tokens_counted"] == 40
    streamed = [body for body in slow.bodies if body.get("stream")]
    assert {body["max_tokens"] for body in streamed} == {TOKENS} and len(streamed) == 4


@pytest.mark.parametrize(
    ("fails", "text"),
    [("busy", "HTTP 503: too many"), ("broken", "broke off"), ("told", "out of memory")],
)
def test_errors_are_counted_beside_whole_answers(slow: Any, fails: str, text: str) -> None:
    slow.fails = fails
    load = Load([20], [3], TOKENS, requests=1, rounds=1)
    (case,) = run_load({"slow": Client(slow.url)}, load, TEXT)
    ((message, count),) = case.errors.items()
    assert text in message and count == 1 and len(case.whole) == 2


def test_prompts_begin_alike_only_where_they_should() -> None:
    prompts = Prompts(TEXT, seed=3)
    made = [prompts.make(100, f"{n}") for n in range(20)]
    assert len({text[:8] for text in made}) == 20
    assert {len(text) for text in made} == {400}
    shared = [prompts.make(100, f"{n}", shared_tokens=60) for n in range(5)]
    assert len({text[:240] for text in shared}) == 1 and len({text[:248] for text in shared}) == 5
    assert prompts.make(100, "1") == made[1] == Prompts(TEXT, seed=3).make(100, "1")
    assert Prompts(TEXT, seed=4).make(100, "1") != made[1]
    assert len(prompts.make(5000, "long")) == 20000
    with pytest.raises(ValueError, match="cannot share 128"):
        Load([128], shared_tokens=128)


def test_a_server_that_does_not_answer_is_one_line(slow: Any) -> None:
    with pytest.raises(ServerError, match="Connection refused"):
        Client("http://127.0.0.1:1")
    with pytest.raises(ValueError, match="must be an address"):
        Client("ftp://somewhere")


def test_names_of_servers() -> None:
    found = named(["ktk=http://a:1", "http://b:2/v1", "c:3"])
    assert found == {"ktk": "http://a:1", "b:2": "http://b:2/v1", "c:3": "c:3"}
    with pytest.raises(ValueError, match="name of its own"):
        named(["a=b:1", "a=b:2"])


def test_the_command_compares_servers_in_turns(
    slow: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, text = tmp_path / "found.json", tmp_path / "text"
    text.write_text(TEXT)
    options = ["-c", "2", "--prompt", "30", "--tokens", "8", "--requests", "1", "--rounds", "2"]
    options += ["--text", str(text)]
    servers = [f"one={slow.url}", f"two={slow.url}/v1"]
    with pytest.raises(SystemExit) as end:
        main(["bench-serve", *servers, *options, "--json", str(report)])
    assert end.value.code == 0
    found = json.loads(report.read_text())
    assert [case["server"] for case in found["cases"]] == ["one", "two"]
    assert all(case["requests"] == 4 for case in found["cases"])
    streamed = [body["prompt"] for body in slow.bodies if body.get("stream")]
    assert set(streamed[:2]) == set(streamed[2:4]) != set(streamed[4:6])  # one, two, one, two
    assert all(body["ignore_eos"] for body in slow.bodies)
    table = capsys.readouterr().out
    assert "one: slow at http://127.0.0.1" in table and "TTFT" in table
    slow.fails, slow.asked = "busy", 2
    with pytest.raises(SystemExit) as end:
        main(["bench-serve", slow.url, *options])
    assert end.value.code == 1
    assert "times HTTP 503: too many" in capsys.readouterr().err


def test_a_plot_has_a_line_for_each_server(slow: Any, tmp_path: Path) -> None:
    options = ["-c", "1,2", "--prompt", "30", "--tokens", "4", "--requests", "1", "--rounds", "1"]
    plot = tmp_path / "serving.svg"
    servers = [f"one={slow.url}", f"two={slow.url}"]
    for wrong in ("serving.gif", "no/serving.svg"):
        with pytest.raises(SystemExit) as end:
            main(["bench-serve", *servers, *options, "--plot", str(tmp_path / wrong)])
        assert end.value.code == 1 and not slow.bodies
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as end:
        main(["bench-serve", *servers, *options, "--plot", str(plot)])
    assert end.value.code == 0
    text = plot.read_text()
    assert all(f"<!-- {name} -->" in text for name in ("one", "two", "clients"))
