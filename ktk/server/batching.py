"""Generating for many requests at once: transformers' continuous batching, with sampling and cancellation of each request's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.logits_process import LogitsProcessorList

from ktk.errors import KtkError
from ktk.integration.transformers.linear import keep_bits_for_any_batch
from ktk.integration.transformers.open import OpenModel, size
from ktk.integration.transformers.sampling import only
from ktk.server.attention import NAME, pad_rows, paged_attention
from ktk.server.engine import Engine, Generation, Limits, Progress, RequestError, ServerBusy
from ktk.server.paged_cache import cache_geometry, cached_shapes

PAGE = 64  # tokens; small pages waste little on short sequences


class CannotBatch(KtkError, RuntimeError):
    """A model that transformers' continuous batching does not run."""


class _Samplers(ContinuousBatchingLogitsProcessorList):
    """Stands where the manager has processors that all requests share, and asks each request's own Sampler.

    Used by the generation thread; ``generations`` is filled by the event loop.
    """

    def __init__(self, generations: dict[str, Generation]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._generations = generations
        self._rows: list[str] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        return None

    def prepare_tensor_args(
        self, requests_in_batch: list[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        self._rows = [r.state.request_id for r in requests_in_batch if r.has_new_token]
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        """scores : float32 (rows, vocab_size); rows beyond the sequences with a new token are fillers."""
        chosen = []
        for row, request_id in enumerate(self._rows):
            own = self._generations.get(request_id)  # None: cancelled since the batch was made
            chosen.append(0 if own is None else own.sampler.choose(scores[row]))
        return only(scores, chosen)


class _Router(OutputRouter):
    """Hands outputs to the requests that wait for them. Those of cancelled requests are dropped, not kept in a queue."""

    def __init__(self, generations: dict[str, Generation]) -> None:
        super().__init__()
        self._generations = generations

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            own = self._generations.get(output.request_id)
            if own is not None:
                made = len(output.generated_tokens)
                own.report(Progress(made, output.is_finished(), output.error))


class BatchingEngine(Engine):
    """Raises CannotBatch for a model that transformers cannot batch, RequestError if the KV cache is too small."""

    def __init__(self, opened: OpenModel, limits: Limits) -> None:
        super().__init__(opened, limits)
        AttentionInterface.register(NAME, paged_attention)
        self._attention = self.model.config._attn_implementation
        with self._own_attention():
            self._shapes = cached_shapes(self.model)
        page_bytes = PAGE * self._cache_bytes_per_token()
        # Two pages more than the context: a sequence's last page, and one that is being filled.
        enough = limits.running * (limits.context // PAGE + 2)
        pages = min(enough, limits.cache_bytes // page_bytes)
        if pages * PAGE < limits.context:
            raise RequestError(
                f"a KV cache of {size(limits.cache_bytes)} holds {pages * PAGE} tokens, and one sequence may have "
                f"{limits.context}: give a larger --kv-cache or a smaller --context"
            )
        self.cache_bytes = pages * page_bytes
        self._manager = self._make_manager(int(pages))
        self._hook = self.model.register_forward_pre_hook(pad_rows, with_kwargs=True)
        keep_bits_for_any_batch(self.model)

    def _cache_bytes_per_token(self) -> int:
        if not self._shapes:
            return super()._cache_bytes_per_token()
        layers = self.model.config.get_text_config().num_hidden_layers
        heads, width = self._geometry()
        return int(layers * heads * 2 * width * self.model.dtype.itemsize)

    def _geometry(self) -> tuple[int, int]:
        """Heads and width of the KV cache. Raises CannotBatch where layers differ in the number of heads."""
        heads = {heads for heads, _ in self._shapes}
        if len(heads) > 1:
            numbers = ", ".join(map(str, sorted(heads)))
            raise CannotBatch(f"its layers cache different numbers of heads: {numbers}")
        return max(self._shapes)

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        """Not by set_attn_implementation: it would look for the flash-attn package."""
        self.model.config._attn_implementation = NAME
        try:
            yield
        finally:
            self.model.config._attn_implementation = self._attention

    def _make_manager(self, pages: int) -> Any:
        self.model.config._attn_implementation = NAME
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
            self.model.config._attn_implementation = self._attention
            raise CannotBatch(str(error)) from error
        manager.logit_processor = _Samplers(self._generations)
        manager.output_router = _Router(self._generations)
        return manager

    def start(self) -> None:
        """Start the generation thread, and wait until it has its KV cache. Raises CannotBatch if it cannot."""
        with contextlib.ExitStack() as stack:
            if self._shapes:
                config = self.model.config.get_text_config()
                stack.enter_context(cache_geometry(config, *self._geometry()))
            self._manager.start()
            while self._manager.batch_processor is None and self._manager.is_running():
                time.sleep(0.01)
        if not self.is_alive:
            error = self._manager.background_thread_status.fatal_error
            self.stop()
            raise CannotBatch(str(error))

    def stop(self) -> None:
        self._hook.remove()
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self.model.config._attn_implementation = self._attention

    @property
    def is_alive(self) -> bool:
        return bool(
            self._manager.is_running()
            and self._manager.background_thread_status.fatal_error is None
        )

    @property
    def running(self) -> int:
        processor = self._manager.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    @property
    def cache_pages(self) -> tuple[int, int]:
        """(free, all) pages; those kept for a following prompt of the same beginning count as free."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0, 0
        cache = processor.cache
        held = sum(
            len(blocks)
            for allocator in cache.cache_allocators.values()
            for blocks in list(allocator.block_table.values())  # the generation thread changes it
        )
        return cache.num_blocks - held, cache.num_blocks

    def _submit(self, generation: Generation) -> None:
        taken = self._manager.add_request(
            generation.ids,
            generation.id,
            generation.max_tokens,
            streaming=True,
            eos_token_id=sorted(self.eos),
        )
        if taken is None:
            raise ServerBusy("the server is shutting down")

    def _cancel(self, generation: Generation) -> None:
        self._manager.cancel_request(generation.id)
