"""A load on servers: so many clients at once, each of which asks again when it has its answer.

Servers that are compared get the same prompts, in turns: of each case first the one, then the
other, round after round, so that a machine that slows down does so for all.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ktk.bench.serving.client import Client, Sample

PERCENTILES = {"median": 50, "p90": 90, "p99": 99}
CHARACTERS = 4.0  # a token, until the server has counted
HEAD = 24  # characters that no two prompts share


@dataclass(frozen=True)
class Load:
    """What is asked.

    prompt_tokens : lengths of prompts, the shared beginning within. concurrency : clients at once.
    output_tokens : of an answer, at most. requests : of each client, in each round. shared_tokens :
    that all prompts of a length begin with; 0: no two begin alike.
    """

    prompt_tokens: Sequence[int] = (128, 1024)
    concurrency: Sequence[int] = (1, 4, 16)
    output_tokens: int = 64
    requests: int = 2
    rounds: int = 3
    shared_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        shortest = min(self.prompt_tokens)
        if self.shared_tokens and self.shared_tokens >= shortest:
            raise ValueError(
                f"prompts of {shortest} tokens cannot share {self.shared_tokens}: share less, or "
                "make them longer"
            )

    @property
    def cases(self) -> list[tuple[int, int]]:
        """(prompt tokens, clients), in the order they are run."""
        return [(length, clients) for length in self.prompt_tokens for clients in self.concurrency]


@dataclass
class Case:
    """What one server made of one length of prompts and number of clients, over all rounds."""

    server: str
    prompt_tokens: int
    concurrency: int
    samples: list[Sample] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # tokens/s in all, of each round

    def add(self, samples: list[Sample]) -> None:
        """One round."""
        self.samples += samples
        seconds = max(s.end for s in samples) - min(s.start for s in samples)
        self.speeds.append(sum(s.output_tokens for s in samples) / seconds)

    @property
    def whole(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def errors(self) -> dict[str, int]:
        """How often each was met."""
        return dict(Counter(s.error for s in self.samples if s.error is not None))

    def to_json(self) -> dict[str, Any]:
        """Medians and percentiles over answers; tokens_per_second is the rounds' median, prompts
        computed in the same time. A stream's tokens/s is from its request to its end.
        """
        whole = self.whole
        gaps = [gap for s in whole if (gap := s.tpot) is not None]
        of_stream = [s.output_tokens / (s.end - s.start) for s in whole]
        return {
            "server": self.server,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_counted": _median([s.prompt_tokens for s in whole]) or None,
            "concurrency": self.concurrency,
            "requests": len(self.samples),
            "errors": self.errors,
            "output_tokens": sum(s.output_tokens for s in whole),
            "tokens_per_second": _median(self.speeds) if whole else None,
            "tokens_per_second_of_rounds": self.speeds,
            "tokens_per_second_of_a_stream": _median(of_stream),
            "ttft_ms": _spread([s.ttft for s in whole]),
            "tpot_ms": _spread(gaps),
        }


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _spread(seconds: list[float]) -> dict[str, float] | None:
    """Percentiles in milliseconds, between neighbours by their distance."""
    if not seconds:
        return None
    found = np.percentile(np.array(seconds) * 1e3, list(PERCENTILES.values()))
    return dict(zip(PERCENTILES, map(float, found), strict=True))


class Prompts:
    """Prompts of a length in tokens: excerpts of a text, each with a head of its own.

    text : to take excerpts of. The same seed gives the same prompts.
    """

    def __init__(self, text: str, seed: int = 0) -> None:
        self._text = " ".join(text.split())
        self._seed = seed
        self._characters = CHARACTERS  # a token

    def calibrate(self, client: Client, num_tokens: int) -> None:
        """Learn from a server how many characters such a prompt's tokens have.

        Raises ServerError if it does not answer.
        """
        prompt = self.make(num_tokens, "calibration")
        counted = client.count(prompt)
        if counted is not None:
            self._characters = len(prompt) / counted

    def make(self, num_tokens: int, name: str, shared_tokens: int = 0) -> str:
        """name : prompts of different names differ from their first word on, after what they
        share.
        """
        shared = self._excerpt(f"shared {num_tokens}", shared_tokens) if shared_tokens else ""
        return shared + self._excerpt(name, num_tokens - shared_tokens)

    def _excerpt(self, name: str, num_tokens: int) -> str:
        draw = random.Random(f"{self._seed} {name}")
        head = f"{draw.getrandbits(64):016x}: "
        length = max(HEAD, round(num_tokens * self._characters)) - len(head)
        at = draw.randrange(len(self._text))
        text = self._text[at:] + " "
        while len(text) < length:
            text += self._text + " "
        return head + text[:length]


def run_load(
    clients: dict[str, Client],
    load: Load,
    text: str,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Iterator[Case]:
    """The cases as they are done, of each one first server first.

    clients : by the name to show. progress : told (rounds done, of all, what runs). Raises
    ServerError if a server does not answer at all.
    """
    makers = {name: Prompts(text, load.seed) for name in clients}
    total, done = len(load.cases) * load.rounds * len(clients), 0
    for length, concurrency in load.cases:
        cases = {name: Case(name, length, concurrency) for name in clients}
        for name, client in clients.items():
            makers[name].calibrate(client, length)
            if load.shared_tokens:  # the first who asks computes it for the others
                client.count(makers[name].make(length, "warm", load.shared_tokens))
        for turn in range(load.rounds):
            for name, client in clients.items():
                progress(done, total, f"{name}: {concurrency} x {length} tokens")
                prompts = [
                    makers[name].make(
                        length, f"{length} {concurrency} {turn} {i}", load.shared_tokens
                    )
                    for i in range(concurrency * load.requests)
                ]
                cases[name].add(_together(client, prompts, concurrency, load.output_tokens))
                done += 1
        yield from cases.values()


def _together(
    client: Client, prompts: list[str], concurrency: int, output_tokens: int
) -> list[Sample]:
    """All prompts by so many clients, who begin at the same time."""
    rest, begin = iter(prompts), threading.Barrier(concurrency)
    lock = threading.Lock()

    def ask() -> list[Sample]:
        found = list[Sample]()
        begin.wait()
        while True:
            with lock:
                prompt = next(rest, None)
            if prompt is None:
                return found
            found.append(client.stream(prompt, output_tokens))

    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(ask) for _ in range(concurrency)]
        return [sample for future in futures for sample in future.result()]
