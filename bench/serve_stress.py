"""Whether `ktk serve` gives the same answer always: greedy answers under cancellations, malformed
requests and sampled ones, against those given alone.

    python bench/serve_stress.py MODEL --answers 5000

Prompts have lengths around the KV cache's pages and share beginnings, so that they are cut into
chunks and find pages of each other's. In each round sixteen of them are answered at once, while
others come and go. An answer is its text and the bits of its log probabilities.
Prints every difference; exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

LENGTHS = (1, 2, 3, 17, 63, 64, 65, 66, 90, 127, 128, 129, 150, 191, 192, 193, 257, 320, 321, 449)
BAD = (
    b"{",
    b"null",
    b'{"prompt": 3}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "n": 2}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": []}',
    b'{"prompt": [1000000000]}',
)
Answer = tuple[str, tuple[float, ...]]


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    def post(self, body: bytes, timeout: float = 300) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            body,
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def greedy(self, prompt: list[int], max_tokens: int) -> Answer:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "logprobs": 0}
        status, text = self.post(json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{status}: {text!r}")
        choice = json.loads(text)["choices"][0]
        return choice["text"], tuple(choice["logprobs"]["token_logprobs"])

    def leave(self, prompt: list[int], after: float) -> None:
        """Ask for a long stream and go away."""
        body = json.dumps({"prompt": prompt, "max_tokens": 400, "stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port)) as raw,
        ):
            raw.sendall(head.encode() + body)
            time.sleep(after)


def make_prompts(vocabulary: int, seed: int) -> list[list[int]]:
    """Of every length three: of one text, of its beginning and another, of others."""
    draw = random.Random(seed)
    common = [draw.randrange(3, vocabulary) for _ in range(max(LENGTHS))]
    prompts = []
    for length in LENGTHS:
        other = [draw.randrange(3, vocabulary) for _ in range(length)]
        prompts += [common[:length], common[: length // 2] + other[length // 2 :], other]
    return prompts


def disturb(client: Client, prompts: list[list[int]], seed: int, stop: threading.Event) -> int:
    """One of the clients that come and go; how many requests it made."""
    draw, made = random.Random(seed), 0
    while not stop.is_set():
        kind = draw.random()
        prompt = draw.choice(prompts)
        if kind < 0.6:
            client.leave(prompt, draw.choice((0, 0.005, 0.05, 0.3)))
        elif kind < 0.8:
            client.post(draw.choice(BAD))
        else:
            body = {"prompt": prompt, "max_tokens": draw.randrange(1, 90), "top_p": 0.9}
            client.post(json.dumps({**body, "temperature": draw.choice((1e-45, 0.7, 2))}).encode())
        made += 1
        time.sleep(draw.random() * 0.2)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--answers", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--clients", type=int, default=16, help="that come and go")
    parser.add_argument("--vocabulary", type=int, default=300, help="prompts have tokens below")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of ktk serve, after --")
    given = parser.parse_args()
    with served(given.model, given.options) as port:
        return run(Client(port), given)


@contextlib.contextmanager
def served(model: str, options: Sequence[str]) -> Iterator[int]:
    """The port of a `ktk serve` that has started, and ends with the block."""
    command = [sys.executable, "-m", "ktk", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = ""
        while "API http" not in line:
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"ktk serve ended with {process.wait()}")
            print(line, end="", flush=True)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        port = int(line.rsplit(":", 1)[1].split("/")[0])
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def run(client: Client, given: argparse.Namespace) -> int:
    prompts = make_prompts(given.vocabulary, given.seed)
    start = time.monotonic()
    alone = [client.greedy(prompt, given.tokens) for prompt in prompts]
    print(f"{len(prompts)} prompts alone: {time.monotonic() - start:.1f} s", flush=True)
    draw, stop = random.Random(given.seed), threading.Event()
    compared = different = 0
    with ThreadPoolExecutor(16 + given.clients) as pool:
        others = [
            pool.submit(disturb, client, prompts, given.seed + 1 + i, stop)
            for i in range(given.clients)
        ]
        try:
            while compared < given.answers:
                chosen = [draw.randrange(len(prompts)) for _ in range(16)]
                futures = [pool.submit(client.greedy, prompts[i], given.tokens) for i in chosen]
                for i, future in zip(chosen, futures, strict=True):
                    got = future.result()
                    if got != alone[i]:
                        different += 1
                        print(f"prompt {i} ({len(prompts[i])} tokens): {got} for {alone[i]}")
                compared += 16
        finally:
            stop.set()
        made = sum(other.result() for other in others)
    again = sum(client.greedy(p, given.tokens) != a for p, a in zip(prompts, alone, strict=True))
    print(
        f"{compared} answers beside {made} other requests: {different} different; {len(prompts)} "
        f"alone afterwards: {again} different; {time.monotonic() - start:.0f} s"
    )
    return int(different + again > 0)


if __name__ == "__main__":
    sys.exit(main())
