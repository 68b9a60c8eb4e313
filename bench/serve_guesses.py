"""What guessing an answer's tokens from its own text brings: tokens/s with guesses and without.

    python bench/serve_guesses.py MODEL [--streams 1 8] [--tokens 100] [--guesses 8] [--rounds 3]

The server's native engine, greedy, in turns with no guesses and with up to --guesses; of a text
that repeats itself (code to be copied, which the prompt ends in the midst of) and of one that does
not (a story). Exit code 1 if the tokens of an answer differ. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import defaultdict
from itertools import product

from rich.console import Console
from rich.table import Table

from ktk.generate.engine import Limits
from ktk.generate.native import NativeEngine
from ktk.generate.open import open_model
from ktk.generate.sampling import Sampling
from ktk.generate.session import Session
from ktk.integration.transformers.tokens import encode

CODE = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    middle = mean(values)
    total = 0.0
    for value in values:
        total += (value - middle) ** 2
    return total / len(values)
"""
TEXTS = {
    "copies code": f"The file is:\n\n{CODE}\nThe same file again, unchanged:\n\n{CODE[:40]}",
    "a story": "Once upon a time, in a village by the sea, an old clockmaker found a letter that",
}


async def answers(engine: NativeEngine, prompts: list[list[int]], count: int) -> list[list[int]]:
    async def one(ids: list[int]) -> list[int]:
        made = engine.generate(ids, Sampling(0.0), count)
        return [token.id async for tokens in made for token in tokens]

    return list(await asyncio.gather(*map(one, prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--guesses", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    opened = open_model(args.model)
    texts = {name: encode(opened.tokenizer, text) for name, text in TEXTS.items()}
    Session(opened.model, opened.tokenizer).generate(texts["a story"], Sampling(0.0), 3)
    speeds: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    right: dict[tuple[str, int], tuple[int, int]] = {}
    made: dict[tuple[str, int], list[list[int]]] = {}
    engines = {
        guesses: NativeEngine(
            opened, Limits(context=1024, running=max(args.streams), guesses=guesses)
        )
        for guesses in (0, args.guesses)
    }
    for engine in engines.values():
        engine.start()
    has_failed = False
    for _, name, streams in product(range(args.rounds), TEXTS, args.streams):
        prompts = [[*texts["a story"][:i], *texts[name]] for i in range(streams)]
        for guesses, engine in engines.items():
            before = engine.guessed, engine.came_true
            start = time.perf_counter()
            tokens = asyncio.run(answers(engine, prompts, args.tokens))
            took = time.perf_counter() - start
            speeds[name, streams, guesses].append(sum(map(len, tokens)) / took)
            has_failed |= made.setdefault((name, streams), tokens) != tokens
            if guesses:
                right[name, streams] = engine.came_true - before[1], engine.guessed - before[0]
    for engine in reversed(engines.values()):  # each leaves the model as it found it
        engine.stop()
    table = Table("text", "streams", "none", f"up to {args.guesses}", "ratio", "came true")
    for name, streams in product(TEXTS, args.streams):
        none, some = (statistics.median(speeds[name, streams, g]) for g in engines)
        came_true, guessed = right[name, streams]
        of = f"{came_true} of {guessed}"
        table.add_row(name, str(streams), f"{none:.3g}", f"{some:.3g}", f"{some / none:.2f}", of)
    Console(width=100).print(table)
    print("tokens differ" if has_failed else "all tokens equal")
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
