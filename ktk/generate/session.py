"""Text from one model for one person: tokens as they come, stopped at any of them,
the KV cache kept for what follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ktk.generate.identity import cache_info
from ktk.generate.lookup import LoneLookup
from ktk.generate.open import OpenModel
from ktk.generate.sampling import Sampler, Sampling, Token
from ktk.generate.text import Detokenizer, StopStrings, stop_tokens
from ktk.integration.transformers.native_sequence import NativeSequence, open_sequence
from ktk.integration.transformers.sequence import CachedSequence
from ktk.integration.transformers.tokens import encode, encode_chat, end_tokens
from ktk.kv.prefix.store import PrefixStore


@dataclass(frozen=True)
class Generated:
    """What one call made. finish_reason : "stop" (end of sequence or stop string), "length" or
    "interrupted".

    prompt_tokens : of the whole prompt; prefilled_tokens : those that were not in the KV cache.
        guessed_tokens : computed as guesses, of which came_true stand. Speeds in tokens/s.
    """

    text: str
    prompt_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish_reason: str
    guessed_tokens: int = 0
    came_true: int = 0

    @property
    def prefill_speed(self) -> float:
        return self.prefilled_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Of the tokens after the first, which the prefill makes."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Session:
    """A model, its tokenizer, and the KV cache of the last sequence,
    of which a following prompt reuses what it shares.

    sequence : what holds that cache; None is generate()'s. guesses : tokens guessed in a pass, at
    most (``lookup.py``); 0: none, and none where a sequence is not native.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sequence: NativeSequence | CachedSequence | None = None,
        guesses: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stopped = False
        self._sequence = CachedSequence(model) if sequence is None else sequence
        is_native = isinstance(self._sequence, NativeSequence)
        self._lookup = LoneLookup(guesses) if guesses and is_native else None

    @classmethod
    def fastest(
        cls, model: Any, tokenizer: Any, kv_dtype: str | None = None, guesses: int = 0
    ) -> Session:
        """Over the fastest sequence that the model can have, which is tried. kv_dtype : as of
        ``open_sequence``.
        """
        return cls(model, tokenizer, open_sequence(model, kv_dtype), guesses)

    @property
    def max_context(self) -> int | None:
        """The longest sequence in tokens that the model's config allows, or None."""
        return self._sequence.longest

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The chat template's tokens, up to where the answer begins.

        Raises ValueError if it refuses the messages.
        """
        return encode_chat(self.tokenizer, messages)

    def encode(self, text: str) -> list[int]:
        """The text's tokens. Raises ValueError if it is not Unicode."""
        return encode(self.tokenizer, text)

    def stop(self) -> None:
        """End the generation that is running after its current forward pass;
        from a signal handler or another thread.
        """
        self.stopped = True

    def keep(self, store: PrefixStore, opened: OpenModel, linear: str) -> bool:
        """Take what a prompt begins with from a store, and let ``save`` put texts there; False if
        the model does not run natively.

        opened : the session's model. linear : of its dense layers, as in ``open_model``.
        """
        if not isinstance(self._sequence, NativeSequence):
            return False
        self._sequence.keep(store, cache_info(opened, self._sequence.native, linear))
        return True

    def save(self) -> None:
        """Bring the text's keys and values to the store, if there is one."""
        if isinstance(self._sequence, NativeSequence):
            self._sequence.save()

    def reset(self) -> None:
        """Forget the KV cache."""
        self._sequence.reset()

    def generate(
        self,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        show: Callable[[str], None] = lambda text: None,
    ) -> Generated:
        """Continue a prompt, calling ``show`` with the text as it becomes certain.

        ids : the whole prompt's tokens. max_tokens : None: to the end of the model's context. stop
        : strings that end the text and are left out of it. Raises ValueError if the prompt is empty
        or too long.
        """
        self.stopped = False
        max_tokens = self._room(ids, max_tokens)
        stop_ids, strings = stop_tokens(self.tokenizer, stop)
        sampler, text, stops = (
            Sampler(sampling, ids),
            Detokenizer(self.tokenizer),
            StopStrings(strings),
        )
        pieces: list[str] = []
        ends = end_tokens(self.model, self.tokenizer) | stop_ids
        reason = "length"
        first: float | None = None

        def give(piece: str) -> None:
            if piece:
                pieces.append(piece)
                show(piece)

        def receive(token: Token) -> bool:
            nonlocal first, reason
            first = first or time.perf_counter()
            if token.id not in ends:
                give(stops.add(text.add(token.id)))
            ended = token.id in ends or stops.found
            reason = "stop" if ended else reason
            return ended

        start = time.perf_counter()
        prefilled = self.generate_tokens(ids, sampler, max_tokens, receive)
        if self.stopped and reason != "stop":
            reason = "interrupted"
        end = time.perf_counter()
        if not stops.found:
            give(stops.add(text.finish()))
            give(stops.finish())
        first = first or end
        return Generated(
            "".join(pieces),
            len(ids),
            prefilled,
            len(sampler.tokens),
            first - start,
            end - first,
            reason,
            0 if self._lookup is None else self._lookup.guessed,
            0 if self._lookup is None else self._lookup.came_true,
        )

    def generate_tokens(
        self,
        ids: list[int],
        sampler: Sampler,
        max_tokens: int,
        receive: Callable[[Token], bool],
    ) -> int:
        """Continue a prompt by tokens of the sampler until ``receive`` says of one that it is the
        last, or ``stop`` is called.

        Returns the number of the prompt's tokens that were not in the KV cache.
        """

        def take(_: int) -> bool:
            return receive(sampler.tokens[-1])

        given = (ids, max_tokens, sampler.choose, take, lambda: self.stopped)
        if isinstance(self._sequence, NativeSequence):
            return self._sequence.generate(*given, self._lookup)
        return self._sequence.generate(*given)

    def _room(self, ids: list[int], max_tokens: int | None) -> int:
        longest = self.max_context
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        if longest is not None and len(ids) >= longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and the model's context is {longest}: shorten "
                "it"
            )
        room = longest - len(ids) if longest is not None else 2**31
        return min(room, max_tokens) if max_tokens is not None else room
