"""Where a step of the server's native engine goes: ms for a token of all streams, by part.

    python bench/serve_steps.py MODEL [--streams 1 8 16] [--tokens 100] [--rounds 3]

The engine and the answers of the server, as events of streams, run in one process; no HTTP. Counted
are steps in which every stream makes a token. A part's time is its own, without that of parts it
calls. "rest" is Python between them: pieces, tables, tokens to their requests. Layers and head are
native; all others together are what Python and the scheduler cost. Medians of all steps.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from ktk.generate import native
from ktk.generate.engine import Limits
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampler, Sampling
from ktk.generate.schedule import Schedule
from ktk.generate.session import Session
from ktk.integration.transformers import plain_pass
from ktk.integration.transformers.tokens import Spelling
from ktk.server.answer import Answer, Answers, Stop
from ktk.server.forms import Form
from ktk.server.metrics import Metrics
from ktk.server.protocol import CompletionRequest

PARTS = ("layers", "head", "embedding", "norm", "sampling", "schedule", "events", "rest")
NATIVE = ("layers", "head")
PROMPT = 32  # tokens


class Clock:
    """Time by part, each without those it calls, of one thread."""

    def __init__(self) -> None:
        self.own: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            self._inside.append(0.0)
            try:
                return call(*args, **named)
            finally:
                took = time.perf_counter() - start
                self.own[name] += took - self._inside.pop()
                self._inside[-1] += took

        return timed


class Steps:
    """Steps of an engine whose parts are timed. all : rows of a step that counts."""

    def __init__(self, engine: NativeEngine) -> None:
        self._clock, self._last, self.all = Clock(), 0.0, 0
        self.took: dict[str, list[float]] = defaultdict(list)
        plain = engine._native.plain
        if plain is None:
            raise SystemExit("this model's passes are not plain: its own forward runs")
        part = self._clock.part
        plain_pass.run_layers = part("layers", plain_pass.run_layers)  # type: ignore[assignment]
        for name, attribute in (("head", "_head"), ("embedding", "_embedding"), ("norm", "_norm")):
            setattr(plain, attribute, part(name, getattr(plain, attribute)))
        Sampler.choose = part("sampling", Sampler.choose)  # type: ignore[method-assign]
        native.places_of_largest = part("sampling", native.places_of_largest)
        Schedule.done = part("schedule", Schedule.done)  # type: ignore[method-assign]
        engine._tell_all = part("events", engine._tell_all)  # type: ignore[method-assign]
        engine._compute = self._counted(engine._compute)  # type: ignore[method-assign]
        own = engine._schedule.next_pass
        engine._schedule.next_pass = part("schedule", own)  # type: ignore[method-assign]

    def _counted(self, compute: Callable[..., None]) -> Callable[..., None]:
        def counted(pieces: list[Any]) -> None:
            compute(pieces)
            now, own = time.perf_counter(), self._clock.own
            if self.all and len(pieces) == self.all and all(p.end - p.first == 1 for p in pieces):
                whole = now - self._last
                for name in PARTS[:-1]:
                    self.took[name].append(own[name])
                self.took["rest"].append(whole - sum(own.values()))
                self.took["step"].append(whole)
                outside = whole - sum(own[name] for name in NATIVE)
                self.took["outside"].append(outside)
            self._last = time.perf_counter()
            own.clear()

        return counted


async def streams(
    engine: NativeEngine, opened: OpenModel, prompts: list[list[int]], own: Sampling, count: int
) -> None:
    metrics, spelling = Metrics(engine, opened.name), Spelling(opened.tokenizer)

    async def one(ids: list[int]) -> None:
        body = CompletionRequest(prompt=ids, stream=True)
        answer = Answer(engine, metrics, ids, own, count, Stop([]))
        form = Form.of_completion(opened.name, spelling, body, [""])
        async for _ in form.events(Answers(metrics, [[answer]], 1)):
            pass

    await asyncio.gather(*map(one, prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    opened = open_model(args.model)
    Session(opened.model, opened.tokenizer).generate(range(300, 309), Sampling(0.0), 3)
    engine = NativeEngine(opened, Limits(context=1024, running=max(args.streams)))
    steps, seed = Steps(engine), random.Random(1)
    engine.start()
    sampling = Sampling(args.temperature, top_p=args.top_p, seed=1)
    found: dict[int, dict[str, float]] = {}
    took: dict[int, dict[str, list[float]]] = {}
    for _ in range(args.rounds):
        for number in args.streams:
            steps.all, steps.took = number, took.setdefault(number, defaultdict(list))
            prompts = [[seed.randrange(1000, 30000) for _ in range(PROMPT)] for _ in range(number)]
            asyncio.run(streams(engine, opened, prompts, sampling, args.tokens))
    engine.stop()
    for number, parts in took.items():
        found[number] = {name: 1e3 * statistics.median(all_of) for name, all_of in parts.items()}
    if args.json:
        print(json.dumps(found))
        return
    table = Table("streams", "step", *PARTS, "outside layers and head")
    for number, of in found.items():
        names = ("step", *PARTS, "outside")
        table.add_row(str(number), *(f"{of[name]:.3g}" for name in names))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
