"""transformers' continuous batching of one model: its manager, thread and paged KV cache,
with attention and tokens chosen by ktk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig

from ktk.errors import KtkError
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.attention_names import decides_by_name
from ktk.integration.transformers.cache import token_bytes
from ktk.integration.transformers.invariance import InvariantModel
from ktk.integration.transformers.paged_attention import NAME, BatchHook, Span, paged_attention
from ktk.integration.transformers.paged_cache import cache_geometry, cached_shapes
from ktk.kv.pages import PAGE
from ktk.kv.sizes import TokenShape


class CannotBatch(KtkError, RuntimeError):
    """A model that transformers' continuous batching does not run."""


class Batches:
    """Runs a model's requests in batches; all of them by their ids.

    prompt_length : id -> the tokens of its prompt, None if nobody knows the request any more.
    choose : (ids, float32 scores (rows, vocab_size)) -> their tokens. report : (id, tokens made,
    whether it is finished, its error or None). All three are called by the generation thread.
    Raises CannotBatch for a model that cannot be batched, as do ``prepare`` and ``start``.
    """

    def __init__(
        self,
        model: Any,
        prompt_length: Callable[[str], int | None],
        choose: Callable[[list[str], torch.Tensor], list[int]],
        report: Callable[[str, int, bool, str | None], None],
    ) -> None:
        self._model = model
        self._prompt_length, self._choose, self._report = prompt_length, choose, report
        AttentionInterface.register(NAME, paged_attention)
        self._attention = hf.attention_implementation(model.config)
        if kind := decides_by_name(model, self._attention, NAME):
            raise CannotBatch(f"{kind} computes by its attention implementation's name")
        with self._own_attention():
            self._shapes = cached_shapes(model)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token as the cache keeps them: all of one width."""
        if not self._shapes:
            return token_bytes(self._model)
        layers = self._model.config.get_text_config().num_hidden_layers
        heads, width = self._geometry()
        return TokenShape(layers, heads, width, width).num_bytes(self._model.dtype.itemsize)

    def _geometry(self) -> tuple[int, int]:
        """Heads and width of the KV cache.

        Raises CannotBatch where layers differ in the number of heads.
        """
        heads = {heads for heads, _ in self._shapes}
        if len(heads) > 1:
            numbers = ", ".join(map(str, sorted(heads)))
            raise CannotBatch(f"its layers cache different numbers of heads: {numbers}")
        return max(self._shapes)

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        hf.set_attention_implementation(self._model.config, NAME)
        try:
            yield
        finally:
            hf.set_attention_implementation(self._model.config, self._attention)

    def prepare(self, pages: int, batch_tokens: int, sequences: int) -> None:
        """Before ``start``. pages : of the KV cache. batch_tokens, sequences :
        of one forward pass, at most.
        """
        hf.set_attention_implementation(self._model.config, NAME)
        try:
            self._manager = self._model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE,
                    num_blocks=pages,
                    max_batch_tokens=batch_tokens,
                    max_requests_per_batch=sequences,
                    use_async_batching=False,
                    use_cuda_graph=False,
                    auto_switch_to_flash=False,
                ),
            )
        except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
            hf.set_attention_implementation(self._model.config, self._attention)
            raise CannotBatch(str(error)) from error
        sampler = hf.BatchSampler(self._tell, self._choose)
        hf.take_over(self._manager, sampler, hf.BatchRouter(self._report))
        self._batch = BatchHook()
        self._hook = self._model.register_forward_pre_hook(self._batch, with_kwargs=True)
        self._invariant = InvariantModel(self._model)

    def _tell(self, parts: list[hf.BatchPart]) -> None:
        """Tell attention of a batch, and keep pages from other sequences whose bits would not be
        theirs. In the generation thread.
        """
        self._batch.spans = []
        for part in parts:
            known = self._prompt_length(part.id)
            prompt = part.num_initial if known is None else known
            part.share(prompt)
            self._batch.spans.append(Span(part.first, prompt))

    def start(self) -> None:
        """Start the generation thread, and wait until it has its KV cache."""
        with contextlib.ExitStack() as stack:
            if self._shapes:
                config = self._model.config.get_text_config()
                stack.enter_context(cache_geometry(config, *self._geometry()))
            self._manager.start()
            while not hf.has_cache(self._manager) and self._manager.is_running():
                time.sleep(0.01)
        if not self.is_alive:
            error = hf.fatal_error(self._manager)
            self.stop()
            raise CannotBatch(str(error))

    def stop(self) -> None:
        """End the generation thread and leave the model as it was."""
        self._hook.remove()
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._invariant.undo()
        hf.set_attention_implementation(self._model.config, self._attention)

    @property
    def is_alive(self) -> bool:
        return bool(self._manager.is_running() and hf.fatal_error(self._manager) is None)

    @property
    def running(self) -> int:
        """Requests that are being generated."""
        return hf.running_requests(self._manager)

    @property
    def cache_pages(self) -> tuple[int, int]:
        """(free, all) pages of the KV cache."""
        return hf.cache_pages(self._manager)

    def add(self, request_id: str, ids: list[int], max_tokens: int, ends: list[int]) -> bool:
        """Whether the request was taken. ends : tokens that end it."""
        taken = self._manager.add_request(
            ids, request_id, max_tokens, streaming=True, eos_token_id=ends
        )
        return taken is not None

    def cancel(self, request_id: str) -> None:
        self._manager.cancel_request(request_id)
