"""Whether `ktk serve` stays what it was: clients that ask and go away at random, for minutes.

    python bench/serve_soak.py --minutes 10 MODEL -- --context 1024 --kv-cache 0.1 --kv-swap 0.05

Prompts have lengths around the KV cache's pages and share beginnings; a small --kv-cache makes
requests give their pages to others. Three of ten answers are left at some token. Each token that
comes, of those left too, is compared with that of the same prompt alone, with the bits of its log
probability. Memory is that of the process that no file backs, every five seconds.
Exit code 1 if a token differs, a page or a request is left over, or memory of the last minute is
more than 2 % from that of the second one.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serve_stress import make_prompts, served

WARM_UP = 60.0  # seconds after which memory must stay
FLAT = 0.02
LONGEST = 128  # tokens of an answer
EVERY = 5.0  # seconds between looks at memory
Token = tuple[str, float]


def info(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/ktk")
        return dict(json.loads(connection.getresponse().read()))


def tokens_of(port: int, prompt: list[int], count: int) -> Iterator[Token]:
    """An answer's tokens as they come; who closes the iterator goes away."""
    body = {"prompt": prompt, "temperature": 0, "max_tokens": count, "logprobs": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()!r}")
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            for choice in event["choices"]:
                found = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
                yield from zip(found["tokens"], found["token_logprobs"], strict=True)


class Clients:
    """What they ask, what must come, and what they counted."""

    def __init__(self, port: int, prompts: list[list[int]]) -> None:
        self.port, self.prompts = port, prompts
        self.alone = [list(tokens_of(port, prompt, LONGEST)) for prompt in prompts]
        self.whole = self.left = self.tokens = self.different = 0
        self._lock = threading.Lock()

    def ask(self, seed: int, end: float) -> None:
        """One client, until the end."""
        draw = random.Random(seed)
        while time.monotonic() < end:
            which, count = draw.randrange(len(self.prompts)), draw.randrange(1, LONGEST + 1)
            leaves_at = draw.randrange(count) if draw.random() < 0.3 else None
            tokens = tokens_of(self.port, self.prompts[which], count)
            came: list[Token] = []
            with contextlib.closing(tokens):  # type: ignore[type-var]
                for token in tokens:
                    if leaves_at is not None and len(came) >= leaves_at:
                        break
                    came.append(token)
            want = self.alone[which][: len(came) if leaves_at is not None else count]
            with self._lock:
                self.whole += leaves_at is None
                self.left += leaves_at is not None
                self.tokens += len(came)
                if came != want:
                    self.different += 1
                    print(f"prompt {which}: {came} for {want}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10, help="at least 3")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=300, help="prompts have tokens below")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of ktk serve, after --")
    given = parser.parse_args()
    with served(given.model, given.options) as port:
        return run(port, given)


def run(port: int, given: argparse.Namespace) -> int:
    prompts = make_prompts(given.vocabulary, given.seed)
    random.Random(given.seed).shuffle(prompts)
    clients = Clients(port, prompts[: given.prompts])
    print(f"{given.prompts} prompts alone: done", flush=True)
    start = time.monotonic()
    end = start + 60 * given.minutes
    memory: list[tuple[float, int]] = []
    with ThreadPoolExecutor(given.clients) as pool:
        asking = [pool.submit(clients.ask, given.seed + i, end) for i in range(given.clients)]
        while time.monotonic() < end and not any(one.done() for one in asking):
            memory.append((time.monotonic() - start, int(info(port)["process_bytes"])))
            time.sleep(EVERY)
        for one in asking:
            one.result()
    time.sleep(2)  # the last ones to leave are being taken out
    after = info(port)
    warm = [size for at, size in memory if WARM_UP <= at < WARM_UP + 60]
    last = [size for at, size in memory if at >= memory[-1][0] - 60]
    growth = statistics.median(last) / statistics.median(warm) - 1
    minutes: dict[int, list[int]] = {}
    for at, size in memory:
        minutes.setdefault(int(at // 60), []).append(size)
    line = " ".join(f"{statistics.median(sizes) / 1e6:.1f}" for sizes in minutes.values())
    lost = after["kv_cache_pages"] - after["kv_cache_pages_free"]
    swap = after["kv_swap"]
    over = after["requests_running"] + after["requests_waiting"]
    print(
        f"{given.clients} clients, {time.monotonic() - start:.0f} s: {clients.whole} answers, "
        f"{clients.left} more left midway, {clients.tokens} tokens compared; "
        f"{clients.different} answers different\n"
        f"preemptions: {swap['swapped_out']} swapped ({swap['pages_out']} pages out, "
        f"{swap['pages_in']} in), {swap['recomputed']} recomputed\n"
        f"afterwards {lost} of {after['kv_cache_pages']} pages held, {swap['bytes']} bytes in the "
        f"swap space, {over} requests\n"
        f"memory: {statistics.median(warm) / 1e6:.1f} MB in the second minute, "
        f"{statistics.median(last) / 1e6:.1f} MB in the last ({growth:+.2%}); "
        f"minute by minute {line}"
    )
    return int(bool(clients.different or lost or swap["bytes"] or over or abs(growth) > FLAT))


if __name__ == "__main__":
    sys.exit(main())
