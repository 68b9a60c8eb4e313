"""Generating for many requests at once: transformers' continuous batching, with sampling and cancellation of each request's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig

from ktk.errors import KtkError
from ktk.generate.attention import NAME, BatchHook, Span, paged_attention
from ktk.generate.describe import size
from ktk.generate.engine import Engine, Generation, Limits, Progress, RequestError, ServerBusy
from ktk.generate.invariance import InvariantModel
from ktk.generate.open import OpenModel
from ktk.generate.paged_cache import cache_geometry, cached_shapes
from ktk.generate.sampling import only
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.attention_names import decides_by_name
from ktk.kv.pages import PAGE, Pages
from ktk.kv.sizes import TokenShape


class CannotBatch(KtkError, RuntimeError):
    """A model that transformers' continuous batching does not run."""


class BatchingEngine(Engine):
    """Raises CannotBatch for a model that transformers cannot batch, RequestError if the KV cache is too small."""

    def __init__(self, opened: OpenModel, limits: Limits) -> None:
        super().__init__(opened, limits)
        self._largest_batch = 0
        AttentionInterface.register(NAME, paged_attention)
        self._attention = hf.attention_implementation(self.model.config)
        if kind := decides_by_name(self.model, self._attention, NAME):
            raise CannotBatch(f"{kind} computes by its attention implementation's name")
        with self._own_attention():
            self._shapes = cached_shapes(self.model)
        token_bytes = self._token_bytes()
        pages = Pages.within(limits.cache_bytes, token_bytes, limits.context, limits.running)
        if pages.num_tokens < limits.context:
            raise RequestError(
                f"a KV cache of {size(limits.cache_bytes)} holds {pages.num_tokens} tokens, and one sequence may have "
                f"{limits.context}: give a larger --kv-cache or a smaller --context"
            )
        self.cache_bytes = pages.num_bytes
        self._batch = BatchHook()
        self._manager = self._make_manager(pages.count)
        self._hook = self.model.register_forward_pre_hook(self._batch, with_kwargs=True)
        self._invariant = InvariantModel(self.model)

    def _token_bytes(self) -> int:
        if not self._shapes:
            return super()._token_bytes()
        layers = self.model.config.get_text_config().num_hidden_layers
        heads, width = self._geometry()
        return TokenShape(layers, heads, width, width).num_bytes(self.model.dtype.itemsize)

    def _geometry(self) -> tuple[int, int]:
        """Heads and width of the KV cache. Raises CannotBatch where layers differ in the number of heads."""
        heads = {heads for heads, _ in self._shapes}
        if len(heads) > 1:
            numbers = ", ".join(map(str, sorted(heads)))
            raise CannotBatch(f"its layers cache different numbers of heads: {numbers}")
        return max(self._shapes)

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        hf.set_attention_implementation(self.model.config, NAME)
        try:
            yield
        finally:
            hf.set_attention_implementation(self.model.config, self._attention)

    def _make_manager(self, pages: int) -> Any:
        hf.set_attention_implementation(self.model.config, NAME)
        try:
            manager = self.model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE,
                    num_blocks=pages,
                    max_batch_tokens=self.limits.batch_tokens,
                    max_requests_per_batch=self.limits.running,
                    use_async_batching=False,
                    use_cuda_graph=False,
                    auto_switch_to_flash=False,
                ),
            )
        except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
            hf.set_attention_implementation(self.model.config, self._attention)
            raise CannotBatch(str(error)) from error
        sampler = hf.BatchSampler(self._prepare, self._choose)
        hf.take_over(manager, sampler, hf.BatchRouter(self._report))
        return manager

    def _prepare(self, parts: list[hf.BatchPart]) -> None:
        """Tell attention of a batch, and keep pages from other sequences whose bits would not be theirs. In the generation thread."""
        self._batch.spans = []
        for part in parts:
            own = self._generations.get(part.id)
            prompt = part.num_initial if own is None else len(own.ids)
            part.share(prompt)
            self._batch.spans.append(Span(part.first, prompt))

    def _choose(self, requests: list[str], scores: torch.Tensor) -> torch.Tensor:
        """Each request's own sampler chooses; the event loop fills ``_generations``. scores : float32 (rows, vocab_size)."""
        self._largest_batch = max(self._largest_batch, len(requests))
        return only(scores, [self._choose_one(*row) for row in zip(requests, scores, strict=False)])

    def _choose_one(self, request_id: str, scores: torch.Tensor) -> int:
        own = self._generations.get(request_id)
        if own is None:
            # Cancelled since the batch was made; or before the manager knew it, which has forgotten that by now.
            self._manager.cancel_request(request_id)
        elif not own.has_failed:
            try:
                return own.sampler.choose(scores)
            except Exception as error:  # whatever it was, the batch goes on without this request
                own.fail(error)
        return 0

    def _report(self, request_id: str, made: int, is_finished: bool, error: str | None) -> None:
        own = self._generations.get(request_id)
        if own is not None:
            own.report(Progress(made, is_finished, error))

    def start(self) -> None:
        """Start the generation thread, and wait until it has its KV cache. Raises CannotBatch if it cannot."""
        with contextlib.ExitStack() as stack:
            if self._shapes:
                config = self.model.config.get_text_config()
                stack.enter_context(cache_geometry(config, *self._geometry()))
            self._manager.start()
            while not hf.has_cache(self._manager) and self._manager.is_running():
                time.sleep(0.01)
        if not self.is_alive:
            error = hf.fatal_error(self._manager)
            self.stop()
            raise CannotBatch(str(error))

    def stop(self) -> None:
        self._hook.remove()
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._invariant.undo()
        hf.set_attention_implementation(self.model.config, self._attention)

    @property
    def is_alive(self) -> bool:
        return bool(self._manager.is_running() and hf.fatal_error(self._manager) is None)

    @property
    def largest_batch(self) -> int:
        return self._largest_batch

    @property
    def running(self) -> int:
        return hf.running_requests(self._manager)

    @property
    def cache_pages(self) -> tuple[int, int]:
        return hf.cache_pages(self._manager)

    def _submit(self, generation: Generation) -> None:
        taken = self._manager.add_request(
            generation.ids,
            generation.id,
            generation.max_tokens,
            streaming=True,
            eos_token_id=sorted(generation.ends),
        )
        if taken is None:
            raise ServerBusy("the server is shutting down")

    def _cancel(self, generation: Generation) -> None:
        self._manager.cancel_request(generation.id)
