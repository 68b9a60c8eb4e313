"""The server's engines in turn on one model: tokens/s by streams; a long prompt, new and known.

    python bench/server_engines.py MODEL TEXT [--streams 1 8 16] [--tokens 48] [--rounds 3]

TEXT : a file of some 4,000 tokens; prompts are parts of it. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Engine, Limits
from ktk.generate.native import NativeEngine
from ktk.generate.open import open_model
from ktk.generate.sampling import Sampling
from ktk.generate.session import Session
from ktk.integration.transformers.tokens import encode

LONG = 1900  # tokens of the long prompt


async def answer(engine: Engine, prompt: list[int], count: int) -> None:
    async for _ in engine.generate(prompt, Sampling(0.0), count):
        pass


async def together(engine: Engine, prompts: list[list[int]], count: int) -> None:
    await asyncio.gather(*(answer(engine, prompt, count) for prompt in prompts))


def seconds(engine: Engine, prompts: list[list[int]], count: int) -> float:
    start = time.perf_counter()
    asyncio.run(together(engine, prompts, count))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    opened = open_model(args.model)
    ids = encode(opened.tokenizer, args.text.read_text())
    Session(opened.model, opened.tokenizer).generate(ids[:9], Sampling(0.0), 3)  # layers are tried
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in range(args.rounds):
        for kind in (NativeEngine, BatchingEngine):
            engine = kind(opened, Limits(context=2048, running=max(args.streams)))
            engine.start()
            name, at = kind.__name__, 97 * turn
            for streams in args.streams:
                at += 100  # texts of their own: none begins as one before
                prompts = [ids[at + 150 * i :][: 40 + 10 * i] for i in range(streams)]
                speed = streams * args.tokens / seconds(engine, prompts, args.tokens)
                found[f"{streams} streams, tokens/s", name].append(speed)
            long = ids[at + 50 :][:LONG]
            found[f"{LONG} tokens new, s", name].append(seconds(engine, [long], 1))
            found[f"{LONG} tokens known, s", name].append(seconds(engine, [long], 1))
            engine.stop()
    table = Table("", "native", "transformers'", "ratio")
    for row in dict.fromkeys(row for row, _ in found):
        native, other = (
            statistics.median(found[row, kind.__name__]) for kind in (NativeEngine, BatchingEngine)
        )
        ratio = native / other if "tokens/s" in row else other / native
        table.add_row(row, f"{native:.3g}", f"{other:.3g}", f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
