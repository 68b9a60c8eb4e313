"""One sequence of a model, continued by generate():
its KV cache is kept for what follows and shares its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ktk.integration.transformers import names as hf
from ktk.integration.transformers.cache import growing_layer
from ktk.integration.transformers.streaming import expert_slots

# Tokens of a prompt run at once: a stop is noticed between chunks. Where experts come and go nearly
# all of them are read for each chunk.
PREFILL_CHUNK, STREAMED_CHUNK = 512, 2048


class _Stop(Exception):
    """Ends generate() between two forward passes."""


class _Tokens(hf.BaseStreamer):
    """Hands each generated token on; generate() gives it the prompt first."""

    def __init__(self, receive: Callable[[int], bool]) -> None:
        self._receive = receive
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt and self._receive(int(value.reshape(-1)[0])):
            raise _Stop
        self._is_prompt = False

    def end(self) -> None:
        return None


class _Chosen(LogitsProcessor):
    """Leaves only the token that ``choose`` chooses."""

    def __init__(self, choose: Callable[[torch.Tensor], int]) -> None:
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids : (1, length). scores : (1, vocab_size)."""
        return hf.only(scores, [self._choose(scores[0].float())])


def longest_context(model: Any) -> int | None:
    """The longest sequence in tokens that a model's config allows, or None."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(longest) if longest else None


def prefill_chunk(model: Any) -> int:
    """Tokens of a prompt that run at once."""
    return PREFILL_CHUNK if expert_slots(model) is None else STREAMED_CHUNK


def common_length(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class CachedSequence:
    """A model and the KV cache of its last sequence.

    cached : the tokens whose keys and values are in it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cached: list[int] = []
        self._cache: Any = None

    @property
    def longest(self) -> int | None:
        """The longest sequence in tokens that the model's config allows, or None."""
        return longest_context(self.model)

    def reset(self) -> None:
        """Forget the KV cache."""
        self._cache, self.cached = None, []

    def generate(
        self,
        ids: list[int],
        max_tokens: int,
        choose: Callable[[torch.Tensor], int],
        receive: Callable[[int], bool],
        is_stopped: Callable[[], bool],
    ) -> int:
        """Continue a prompt; returns the number of its tokens that were not in the KV cache.

        choose : float32 logits (vocab_size,) -> the next token. receive : told of each one, says
            whether it is the last.
        is_stopped : asked before each forward pass.
        """

        def check(*_: object) -> None:
            if is_stopped():
                raise _Stop

        self._keep_common(ids)
        prefilled, made = len(ids) - len(self.cached), list[int]()

        def take(token: int) -> bool:
            made.append(token)
            return receive(token)

        hook = self.model.register_forward_pre_hook(check)
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
                logits_processor=LogitsProcessorList([_Chosen(choose)]),
                streamer=_Tokens(take),
                use_cache=True,
            )
        except _Stop:
            pass
        finally:
            hook.remove()
            if self._cache is not None:
                self.cached = [*ids, *made][: self._cache.get_seq_length()]
        return prefilled

    @torch.no_grad()
    def _prefill(self, ids: list[int]) -> None:
        """Run a prompt except its last chunk.

        generate() with prefill_chunk_size reads all again in transformers 5.20, cached or not.
        """
        if self._cache is None:
            return
        many = prefill_chunk(self.model)
        for start in range(len(self.cached), len(ids) - many, many):
            chunk = torch.tensor([ids[start : start + many]])
            named = {**hf.last_logits(self.model), hf.CACHE: self._cache}
            self.model(input_ids=chunk, use_cache=True, **named)

    def _keep_common(self, ids: list[int]) -> None:
        """Crop the cache to the tokens it shares with a prompt, all but its last one at most:
        that one gives the logits.
        """
        if hf.keeps_own_cache(self.model):  # MiniMax-Text-01
            return
        common = common_length(self.cached, ids[:-1])
        if self._cache is not None and common and common < len(self.cached):
            try:
                self._cache.crop(common - len(self.cached))
            except (ValueError, RuntimeError, AttributeError):
                common = 0  # recurrent states and sliding windows cannot be taken back
            if self._cache.get_seq_length() != common:
                common = 0
        if self._cache is None or not common:
            self._cache = DynamicCache(config=self.model.config)
            for index in range(len(self._cache.layers)):
                growing_layer(self._cache, index)
        self.cached = self.cached[:common]
