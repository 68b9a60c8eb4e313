"""Text from one model for one person: tokens as they come, stopped at any of them, the KV cache kept for what follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList

from ktk.generate.sampling import ChosenBySampler, Sampler, Sampling, Token
from ktk.generate.text import Detokenizer, StopStrings, stop_tokens
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.cache import growing_layer

PREFILL_CHUNK = 512  # tokens of a prompt run at once: a stop is noticed between chunks


@dataclass(frozen=True)
class Generated:
    """What one call made. finish_reason : "stop" (end of sequence or stop string), "length" or "interrupted".

    prompt_tokens : of the whole prompt; prefilled_tokens : those that were not in the KV cache. Speeds in tokens/s.
    """

    text: str
    prompt_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish_reason: str

    @property
    def prefill_speed(self) -> float:
        return self.prefilled_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Of the tokens after the first, which the prefill makes."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class _Stop(Exception):
    """Ends generate() between two forward passes."""


class _Tokens(hf.BaseStreamer):
    """Hands each generated token on; generate() gives it the prompt first."""

    def __init__(self, receive: Callable[[int], None]) -> None:
        self._receive = receive
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self._receive(int(value.reshape(-1)[0]))
        self._is_prompt = False

    def end(self) -> None:
        return None


class Session:
    """A model, its tokenizer, and the KV cache of the last sequence, of which a following prompt reuses what it shares."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stopped = False
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache

    @property
    def max_context(self) -> int | None:
        """The longest sequence in tokens that the model's config allows, or None."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(longest) if longest else None

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The chat template's tokens, up to where the answer begins. Raises ValueError if it refuses the messages."""
        return encode_chat(self.tokenizer, messages)

    def encode(self, text: str) -> list[int]:
        """The text's tokens. Raises ValueError if it is not Unicode."""
        return encode(self.tokenizer, text)

    def stop(self) -> None:
        """End the generation that is running after its current forward pass; from a signal handler or another thread."""
        self.stopped = True

    def reset(self) -> None:
        """Forget the KV cache."""
        self._cache, self._cached = None, []

    def generate(
        self,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        show: Callable[[str], None] = lambda text: None,
    ) -> Generated:
        """Continue a prompt, calling ``show`` with the text as it becomes certain.

        ids : the whole prompt's tokens. max_tokens : None: to the end of the model's context. stop : strings that end the
        text and are left out of it. Raises ValueError if the prompt is empty or too long.
        """
        self.stopped = False
        max_tokens = self._room(ids, max_tokens)
        stop_ids, strings = stop_tokens(self.tokenizer, stop)
        sampler, text, stops = Sampler(sampling), Detokenizer(self.tokenizer), StopStrings(strings)
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
        )

    def generate_tokens(
        self,
        ids: list[int],
        sampler: Sampler,
        max_tokens: int,
        receive: Callable[[Token], bool],
    ) -> int:
        """Continue a prompt by tokens of the sampler until ``receive`` says of one that it is the last, or ``stop`` is called.

        Returns the number of the prompt's tokens that were not in the KV cache.
        """

        def take(_: int) -> None:
            if receive(sampler.tokens[-1]):
                raise _Stop

        self._keep_common(ids)
        prefilled = len(ids) - len(self._cached)
        hook = self.model.register_forward_pre_hook(self._check_stopped)
        try:
            self._prefill(ids)
            self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                **{hf.CACHE: self._cache},
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([ChosenBySampler(sampler)]),
                streamer=_Tokens(take),
                use_cache=True,
            )
        except _Stop:
            pass
        finally:
            hook.remove()
            if self._cache is not None:
                sequence = ids + [token.id for token in sampler.tokens]
                self._cached = sequence[: self._cache.get_seq_length()]
        return prefilled

    @torch.no_grad()
    def _prefill(self, ids: list[int]) -> None:
        """Run a prompt but for its last chunk. generate() with prefill_chunk_size reads all again in transformers 5.20, cached or not."""
        if self._cache is None:
            return
        for start in range(len(self._cached), len(ids) - PREFILL_CHUNK, PREFILL_CHUNK):
            chunk = torch.tensor([ids[start : start + PREFILL_CHUNK]])
            named = {**hf.last_logits(self.model), hf.CACHE: self._cache}
            self.model(input_ids=chunk, use_cache=True, **named)

    def _room(self, ids: list[int], max_tokens: int | None) -> int:
        longest = self.max_context
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        if longest is not None and len(ids) >= longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and the model's context is {longest}: shorten it"
            )
        room = longest - len(ids) if longest is not None else 2**31
        return min(room, max_tokens) if max_tokens is not None else room

    def _check_stopped(self, *_: object) -> None:
        if self.stopped:
            raise _Stop

    def _keep_common(self, ids: list[int]) -> None:
        """Crop the cache to the tokens it shares with a prompt, all but its last one at most: that one gives the logits."""
        if hf.keeps_own_cache(self.model):  # MiniMax-Text-01
            return
        common = 0
        for cached, wanted in zip(self._cached, ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        if self._cache is not None and common and common < len(self._cached):
            try:
                self._cache.crop(common - len(self._cached))
            except (ValueError, RuntimeError, AttributeError):
                common = 0  # recurrent states and sliding windows cannot be taken back
            if self._cache.get_seq_length() != common:
                common = 0
        if self._cache is None or not common:
            self._cache = DynamicCache(config=self.model.config)
            for index in range(len(self._cache.layers)):
                growing_layer(self._cache, index)
        self._cached = self._cached[:common]


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens. Raises ValueError if it is not Unicode."""
    _check_unicode(text)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the answer begins.

    Raises ValueError if the template refuses the messages, or one is not Unicode.
    """
    from jinja2 import TemplateError

    for message in messages:
        _check_unicode(message["content"])
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    ids: list[int] = encoded["input_ids"]
    return ids


def _check_unicode(text: str) -> None:
    """Tokenizers take no halves of surrogate pairs: JSON's "\\ud800" is one, and a byte of a command line that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start}: "
            f"it must be whole Unicode characters"
        ) from error


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text: those of the generation config, and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {int(t) for t in (*listed, tokenizer.eos_token_id) if t is not None and t >= 0}
