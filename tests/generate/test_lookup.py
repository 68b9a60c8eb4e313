"""Guesses from a text's own tokens, as many as pay; and the same answers with them as without."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

pytest.importorskip("transformers")

from ktk.generate.engine import Limits
from ktk.generate.lookup import NGRAM, PROBE_EVERY, Lookup, PassCosts
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampling, Token
from ktk.generate.session import Session
from make.serving import make_model


def test_a_guess_is_what_followed_the_same_tokens_last() -> None:
    tokens = [1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 1, 2, 3]
    lookup = Lookup(tokens)
    assert lookup.guess(0.0, 1)[:4] == [5, 6, 7, 1]
    tokens += [5]
    assert lookup.guess(0.0, 1)[:2] == [6, 7]
    tokens += [99]
    assert lookup.guess(0.0, 1) == []
    assert Lookup([4] * (NGRAM - 1)).guess(0.0, 1) == []
    assert Lookup(tokens, 0).guess(0.0, 1) == []


def test_guesses_are_those_of_a_search_through_the_text() -> None:
    draw = random.Random(8)
    tokens = [draw.randrange(3) for _ in range(NGRAM)]
    lookup = Lookup(tokens, 4)
    for _ in range(300):
        last = tokens[-NGRAM:]
        ends = [e for e in range(NGRAM, len(tokens)) if tokens[e - NGRAM : e] == last]
        longer = list(tokens)
        for place in range(ends[-1], ends[-1] + 4) if ends else ():
            longer.append(longer[place])  # what repeats goes on in the guesses
        assert lookup.guess(0.0, 1) == longer[len(tokens) :]
        tokens.append(draw.randrange(3))


def test_what_does_not_come_true_is_guessed_no_more_and_tried_again() -> None:
    tokens = [1, 2, 3] * 8
    lookup = Lookup(tokens)
    for _ in range(40):
        lookup.learn(1, 0)
    counts = []
    for _ in range(2 * PROBE_EVERY):
        counts.append(len(lookup.guess(0.2, 1)))
        tokens.append(tokens[-3])
    assert set(counts) == {0, 1} and counts.count(1) <= 3
    for _ in range(40):
        lookup.learn(4, 3)
    assert 0.7 < lookup.rate < 0.8 and len(lookup.guess(0.2, 1)) > 2
    assert len(lookup.guess(0.06, 16)) < len(lookup.guess(0.06, 1))


def test_the_cost_of_a_row_is_that_of_passes_of_late() -> None:
    costs = PassCosts()
    assert costs.share_of_row(1) == pytest.approx(PassCosts.PRIOR)
    for rows in [1, 2, 4, 8] * 30:
        costs.add(rows, 6e-3 + 2e-3 * rows)
    assert costs.share_of_row(1) == pytest.approx(2 / 8, rel=0.01)
    assert costs.share_of_row(16) == pytest.approx(2 / 38, rel=0.01)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    opened = open_model(make_model(tmp_path_factory.mktemp("lookup") / "tiny", is_native=True))
    Session(opened.model, opened.tokenizer).generate([5, 6], Sampling(0.0), 3)
    return opened


PROMPTS = [[3 + (i + j) % (5 + i) for j in range(50 + 7 * i)] for i in range(4)]


def answers(opened: OpenModel, guesses: int, **how: Any) -> tuple[list[list[Token]], NativeEngine]:
    engine = NativeEngine(opened, Limits(400, 4, 256, 96, 64 << 20, guesses))
    engine._costs.share_of_row = lambda _: 0.0  # type: ignore[method-assign]
    engine.start()

    async def one(prompt: list[int], seed: int) -> list[Token]:
        sampling = Sampling(seed=seed, num_logprobs=0, **how)
        parts = engine.generate(prompt, sampling, 150)
        return [token async for tokens in parts for token in tokens]

    async def every() -> list[list[Token]]:
        return list(await asyncio.gather(*(one(p, i) for i, p in enumerate(PROMPTS))))

    try:
        first = asyncio.run(every())
        assert asyncio.run(every()) == first  # from pages that were kept
        assert engine.cache_pages[0] == engine.cache_pages[1]
    finally:
        engine.stop()
    return first, engine


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_answers_are_those_without_guesses(served: OpenModel, temperature: float) -> None:
    """Log probabilities too, over pages that end amid guesses; many were wrong, many right."""
    want, without = answers(served, 0, temperature=temperature)
    got, engine = answers(served, 8, temperature=temperature)
    assert got == want
    assert without.guessed == 0
    assert 0 < engine.came_true < engine.guessed


def test_one_persons_answers_are_those_without_guesses(served: OpenModel) -> None:
    prompt = served.tokenizer("def add(a, b):\n    return a + b\ndef add(a, b):\n")["input_ids"]
    texts, guessed = [], []
    for guesses in (0, 8):
        session = Session.fastest(served.model, served.tokenizer, guesses=guesses)
        for _ in range(2):
            made = session.generate(prompt, Sampling(0.5, seed=5), 90)
            texts.append(made.text)
            guessed.append(made.guessed_tokens)
            assert made.came_true <= made.guessed_tokens and made.generated_tokens == 90
    assert len(set(texts)) == 1
    assert guessed[:2] == [0, 0] and all(guessed[2:])
