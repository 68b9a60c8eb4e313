"""Generating for many requests at once, in batches,
with sampling and cancellation of each request's own.
"""

from __future__ import annotations

import torch

from ktk.generate.engine import Engine, Generation, Limits, Progress, ServerBusy, pages_within
from ktk.generate.open import OpenModel
from ktk.integration.transformers.batches import Batches


class BatchingEngine(Engine):
    """Raises CannotBatch for a model that transformers cannot batch,
    RequestError if the KV cache is too small.
    """

    def __init__(self, opened: OpenModel, limits: Limits) -> None:
        super().__init__(opened, limits)
        self._largest_batch = 0
        self._batches = Batches(self.model, self._prompt_length, self._choose, self._report)
        pages = pages_within(limits, self._batches.token_bytes)
        self.cache_bytes = pages.num_bytes
        self._batches.prepare(pages.count, limits.batch_tokens, limits.running)

    # The generation thread calls these three; the event loop fills ``_generations``.

    def _prompt_length(self, request_id: str) -> int | None:
        own = self._generations.get(request_id)
        return None if own is None else len(own.ids)

    def _choose(self, requests: list[str], scores: torch.Tensor) -> list[int]:
        """Each request's own sampler chooses.

        scores : float32 (rows, vocab_size), at least one for each request.
        """
        self._largest_batch = max(self._largest_batch, len(requests))
        return [self._choose_one(*row) for row in zip(requests, scores, strict=False)]

    def _choose_one(self, request_id: str, scores: torch.Tensor) -> int:
        own = self._generations.get(request_id)
        if own is None:
            # Cancelled since the batch was made; or before the manager knew it, which has forgotten
            # that by now.
            self._batches.cancel(request_id)
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
        """Start the generation thread, and wait until it has its KV cache.

        Raises CannotBatch if it cannot.
        """
        self._batches.start()

    def stop(self) -> None:
        self._batches.stop()

    @property
    def is_alive(self) -> bool:
        return self._batches.is_alive

    @property
    def largest_batch(self) -> int:
        return self._largest_batch

    @property
    def running(self) -> int:
        return self._batches.running

    @property
    def cache_pages(self) -> tuple[int, int]:
        return self._batches.cache_pages

    def _submit(self, generation: Generation) -> None:
        ends = sorted(generation.ends)
        if not self._batches.add(generation.id, generation.ids, generation.max_tokens, ends):
            raise ServerBusy("the server is shutting down")

    def _cancel(self, generation: Generation) -> None:
        self._batches.cancel(generation.id)
