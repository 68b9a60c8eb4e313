"""`ktk run` and `chat` over ktk's own layers: the same text as by generate(), from whatever was
there before.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from ktk.integration.transformers import fuse_decoder_layers
from ktk.integration.transformers import native_sequence as native
from ktk.integration.transformers.decoder_layers import native_calls
from ktk.integration.transformers.native_sequence import NativeSequence, open_sequence
from ktk.integration.transformers.sequence import PREFILL_CHUNK, CachedSequence
from make.fused_layers import FUSED, make, small_matrices_too

__all__ = ["small_matrices_too"]  # a fixture for every test

NEW = 12


def tiny(kind: str, **changes: Any) -> Any:
    model = make(kind, max_position_embeddings=2048, **changes)
    fuse_decoder_layers(model)
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [3 + (5 * j + seed) % 57 for j in range(length)]


def continued(sequence: Any, ids: list[int], count: int = NEW) -> tuple[list[int], int]:
    """Greedy tokens, and how many of the prompt's were not there."""
    made: list[int] = []

    def receive(token: int) -> bool:
        made.append(token)
        return False

    new = sequence.generate(ids, count, lambda x: int(x.argmax()), receive, lambda: False)
    return made, new


@pytest.mark.parametrize("kind", FUSED)
def test_tokens_are_those_of_generate(kind: str) -> None:
    model = tiny(kind)
    sequence = open_sequence(model)
    assert isinstance(sequence, NativeSequence)
    for length in (1, 65, 230):
        ids = prompt_of(length, length)
        before = native_calls(model)
        got, new = continued(sequence, ids)
        layers = model.config.num_hidden_layers
        assert native_calls(model) - before == (new + NEW - 1) * layers
        assert got == continued(CachedSequence(model), ids)[0]


def test_a_prompt_goes_on_from_what_it_shares() -> None:
    model = tiny("gpt_oss")
    sequence = open_sequence(model)
    ids = prompt_of(PREFILL_CHUNK + 70)
    made, new = continued(sequence, ids)
    assert new == len(ids) and sequence.cached == [*ids, *made[:-1]]
    for common, other in ((len(ids) + 5, [*ids, *made[:5], 9, 8]), (100, [*ids[:100], 7, 7])):
        got, new = continued(sequence, other)
        assert new == len(other) - common
        assert got == continued(open_sequence(model), other)[0]
    again, new = continued(sequence, other)
    assert new == 1 and again == got
    sequence.reset()
    assert continued(sequence, other) == (got, len(other))


def test_it_stops_when_it_is_told_to() -> None:
    sequence = open_sequence(tiny("qwen3_moe"))
    ids = prompt_of(3 * PREFILL_CHUNK)
    asked: list[int] = []

    def is_stopped() -> bool:
        asked.append(len(sequence.cached))
        return len(asked) > 2

    sequence.generate(ids, NEW, lambda x: 1 // 0, lambda _: False, is_stopped)
    assert asked == [0, PREFILL_CHUNK, 2 * PREFILL_CHUNK]
    assert sequence.cached == ids[: 2 * PREFILL_CHUNK]
    made: list[int] = []
    sequence.generate(ids, NEW, lambda _: 5, lambda t: len(made.append(t) or made) == 3, bool)
    assert made == [5, 5, 5]


def test_what_comes_out_otherwise_is_left_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Any, tokens: list[int]) -> torch.Tensor:
        return torch.zeros(self.model.config.vocab_size)

    model = tiny("qwen3_moe")
    assert isinstance(open_sequence(model), NativeSequence)
    monkeypatch.setattr(native.NativeSequence, "logits", off)
    assert isinstance(open_sequence(model), CachedSequence)
    monkeypatch.undo()
    assert isinstance(open_sequence(make("qwen3_moe", packs_linears=False)), CachedSequence)


class Told:
    """Guesses what is to come, as it knows it; of every third guess what does not come."""

    def __init__(self, whole: list[int]) -> None:
        self.whole, self.passes, self.came_true = whole, 0, 0

    def begin(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def guess(self) -> list[int]:
        self.passes += 1
        next_ones = self.whole[len(self.tokens) :][: self.passes % 5]
        return [t + 1 if place == self.passes % 3 else t for place, t in enumerate(next_ones)]

    def learn(self, guessed: int, came_true: int, seconds: float) -> None:
        assert seconds > 0 and came_true <= guessed
        self.came_true += came_true


def test_guesses_change_no_token_and_no_logit() -> None:
    """With sliding windows: keys of wrong guesses must not be seen."""
    sequence = open_sequence(tiny("gpt_oss"))
    ids, count = prompt_of(230), 60
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> int:
        seen.append(logits)
        return int(logits.argmax())

    made: list[int] = []
    sequence.generate(ids, count, choose, lambda t: bool(made.append(t)), lambda: False)
    expected, cached = seen[:], sequence.cached
    seen.clear()
    sequence.reset()
    told, again = Told([*ids, *made]), list[int]()
    sequence.generate(ids, count, choose, lambda t: bool(again.append(t)), lambda: False, told)
    assert again == made and all(map(torch.equal, expected, seen)) and len(seen) == count
    assert sequence.cached == cached
    assert told.passes + told.came_true == count - 1 and told.came_true > 10
    other = [*ids, *made, 9, 8]
    assert continued(sequence, other)[0] == continued(open_sequence(sequence.model), other)[0]


def test_a_text_ends_amid_its_guesses() -> None:
    sequence = open_sequence(tiny("gpt_oss"))
    ids = prompt_of(20)
    made, _ = continued(sequence, ids, 9)
    told, again = Told([*ids, *made]), list[int]()
    told.guess = lambda: made[len(told.tokens) - len(ids) :]  # type: ignore[method-assign]
    sequence.generate(
        ids, 40, lambda x: int(x.argmax()), lambda t: len(again.append(t) or again) == 5, bool, told
    )
    assert again == made[:5] and sequence.cached == [*ids, *made[:4]]
