"""Generating for one request after another, by generate(): for models that cannot be batched.

Linear attention, Mamba and convolutions keep states that transformers' continuous batching has no
place for.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading

from ktk.generate.engine import Engine, Generation, Limits, Progress, Reuse
from ktk.generate.open import OpenModel
from ktk.generate.sampling import Token
from ktk.generate.session import Session
from ktk.integration.transformers.cache import token_bytes


class SequentialEngine(Engine):
    """Keeps the last request's KV cache: a conversation that goes on is not read again."""

    def __init__(self, opened: OpenModel, limits: Limits) -> None:
        super().__init__(opened, limits)
        self.cache_bytes = limits.context * token_bytes(self.model)
        self._session = Session(self.model, self.tokenizer)
        # By priority, then as they came; None: the end.
        self._queue: queue.PriorityQueue[tuple[float, int, Generation | None]]
        self._queue, self._numbers = queue.PriorityQueue(), itertools.count()
        self._current: Generation | None = None
        self._is_stopping = False
        self._turn = threading.Lock()  # held while the current request changes or is cancelled
        self._thread = threading.Thread(target=self._run, name="ktk-generation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._turn:
            self._is_stopping = True
            self._session.stop()
        self._queue.put((-math.inf, next(self._numbers), None))
        self._thread.join(30)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @property
    def cache_pages(self) -> tuple[int, int]:
        return 0, 0

    def _submit(self, generation: Generation) -> None:
        self._queue.put((generation.priority, next(self._numbers), generation))

    def _cancel(self, generation: Generation) -> None:
        with self._turn:
            generation.is_cancelled = True
            if self._current is generation:
                self._session.stop()

    def _run(self) -> None:
        while (generation := self._queue.get()[2]) is not None:
            with self._turn:
                if self._is_stopping:
                    return
                if generation.is_cancelled:
                    continue
                self._current = generation
                self._session.stopped = False
            last = self._answer(generation)
            with self._turn:
                self._current = None
            generation.report(last)

    def _answer(self, generation: Generation) -> Progress:
        """Generate one request's tokens; how it ended."""
        made = generation.sampler.tokens

        def receive(token: Token) -> bool:
            generation.report(Progress(len(made)))
            return token.id in generation.ends

        try:
            computed = self._session.generate_tokens(
                generation.ids, generation.sampler, generation.max_tokens, receive
            )
        except Exception as error:  # whatever it was, this request fails and the next may not
            self._session.reset()
            return Progress(len(made), True, str(error) or type(error).__name__)
        generation.reuse = Reuse(memory=len(generation.ids) - computed)
        return Progress(len(made), True)
