"""What every engine of the server is: it generates for requests, each with sampling, limits and an
end of its own.

``native.py`` runs many at once by ktk's own decoder layers, ``batching.py`` by transformers',
``sequential.py`` one after another what cannot be batched; ``trial.py`` chooses.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ktk.errors import KtkError
from ktk.generate.describe import size
from ktk.generate.open import OpenModel
from ktk.generate.sampling import Sampler, Sampling, Token
from ktk.integration.transformers.tokens import end_tokens
from ktk.kv.pages import Pages
from ktk.kv.prefix.kept import KeptPages
from ktk.kv.prefix.store import PrefixStore
from ktk.kv.sizes import SERVER_CACHE
from ktk.kv.swap import SwapSpace

SPEED_WINDOW = 10.0  # seconds over which tokens/s is taken


class RequestError(KtkError, ValueError):
    """A request that this engine cannot take; its message is for the client.

    param : the request's field, if it is one's fault.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ServerBusy(KtkError, RuntimeError):
    """The engine cannot take a request now."""


@dataclass(frozen=True)
class Limits:
    """context : tokens of one sequence, prompt and answer. running : sequences of a batch; waiting
        : requests beyond.

    batch_tokens : of one forward pass. cache_bytes : of keys and values of all sequences together.
    guesses : of an answer's next tokens in one pass (``lookup.py``), at most. swap_bytes : beside
        the cache, for sequences that had to leave it for a while. kv_dtype : of the cache, a row of
        ``KV_DTYPES``; None: the model's.
    """

    context: int
    running: int = 16
    waiting: int = 256
    batch_tokens: int = 512
    cache_bytes: int = SERVER_CACHE
    guesses: int = 0
    swap_bytes: int = 0
    kv_dtype: str | None = None


def pages_within(limits: Limits, token_bytes: int) -> Pages:
    """Those of an engine whose tokens take so many bytes.

    Raises RequestError if a sequence as long as the context does not fit into them.
    """
    pages = Pages.within(limits.cache_bytes, token_bytes, limits.context, limits.running)
    if pages.num_tokens < limits.context:
        raise RequestError(
            f"a KV cache of {size(limits.cache_bytes)} holds {pages.num_tokens} tokens, and one "
            f"sequence may have {limits.context}: give a larger --kv-cache or a smaller --context"
        )
    return pages


class Progress(NamedTuple):
    """num_tokens : made so far. error : why the request failed, or None."""

    num_tokens: int
    is_finished: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Reuse:
    """Tokens of prompts that were not computed: their keys and values were in memory, or came from
    the disk.
    """

    memory: int = 0
    disk: int = 0

    @property
    def tokens(self) -> int:
        return self.memory + self.disk


@dataclass
class Generation:
    """One request in an engine.

    The event loop reads ``progress``, None in it: the request ends where it is. reuse : known from
    its first token on; of the sequential engine from its end on.
    """

    ids: list[int]
    sampler: Sampler
    max_tokens: int
    loop: asyncio.AbstractEventLoop
    priority: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    progress: asyncio.Queue[Progress | None] = field(default_factory=asyncio.Queue)
    reuse: Reuse = Reuse()
    is_cancelled: bool = False
    has_failed: bool = False
    hidden: torch.Tensor | None = None  # of an embedding, once it is finished

    @property
    def is_embedding(self) -> bool:
        """Whether no token is wanted but the last one's hidden state."""
        return self.max_tokens == 0

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end it."""
        return self.sampler.sampling.ends

    def report(self, progress: Progress) -> None:
        """From the generation thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.progress.put_nowait, progress)

    def fail(self, error: Exception) -> None:
        """From the generation thread: this request ends with an error, and no other one."""
        self.has_failed = True
        text = str(error) or type(error).__name__
        self.report(Progress(len(self.sampler.tokens), error=text))


def report_all(news: list[tuple[Generation, Progress]]) -> None:
    """``Generation.report`` of many: the event loop is woken once, not once for each."""
    for loop in {own.loop for own, _ in news}:
        of_loop = [(own.progress, progress) for own, progress in news if own.loop is loop]
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(_put_all, of_loop)


def _put_all(news: list[tuple[asyncio.Queue[Progress | None], Progress]]) -> None:
    for queue, progress in news:
        queue.put_nowait(progress)


class Engine(ABC):
    """``start`` before the first request, ``stop`` at the end; ``generate`` from one event loop."""

    cache_bytes: int  # of keys and values, when all of the cache is in use
    why_alone: str | None = None  # why requests run one by one; None: they share batches
    why_not_native: str | None = None  # why torch runs the layers; None: ktk's own kernels do
    embeds = False  # whether it gives hidden states
    kept: KeptPages | None = None  # pages on the disk, if any are
    swap: SwapSpace | None = None  # of sequences that the pages did not suffice for
    guessed = came_true = 0  # tokens of answers that were guessed; that were what was chosen

    def __init__(self, opened: OpenModel, limits: Limits) -> None:
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.limits = limits
        self.eos = end_tokens(self.model, self.tokenizer)
        self.reuse = Reuse()  # of all prompts so far
        self._generations: dict[str, Generation] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    @abstractmethod
    def start(self) -> None:
        """Start the generation thread, and wait until it can take requests."""

    @abstractmethod
    def stop(self) -> None:
        """End the generation thread; requests that still run fail."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether requests are still answered."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Sequences being generated."""

    @property
    @abstractmethod
    def cache_pages(self) -> tuple[int, int]:
        """(free, all) pages of the KV cache; (0, 0) where it has none."""

    def keep(self, store: PrefixStore, opened: OpenModel, linear: str) -> bool:
        """Take pages that a prompt begins with from a store, and put those of ended texts there;
        before the first request. False if this engine has no pages.

        opened : the engine's model. linear : of its dense layers, as in ``open_model``.
        """
        return False

    @property
    def largest_batch(self) -> int:
        """Sequences that one forward pass gave a token, at most so far."""
        return 1

    @property
    def prefix_tokens(self) -> tuple[int, int]:
        """(found, looked up): tokens of prompts whose keys and values were there, of all."""
        return 0, 0

    @abstractmethod
    def _submit(self, generation: Generation) -> None:
        """Take a request on. Raises ServerBusy."""

    @abstractmethod
    def _cancel(self, generation: Generation) -> None:
        """End a request that nobody waits for any more."""

    @property
    def unfinished(self) -> int:
        """Requests that somebody waits for."""
        return len(self._generations)

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return max(0, len(self._generations) - self.running)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens/s of all requests together, over the last ten seconds."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            if not self._recent:
                return 0.0
            span = max(now - self._recent[0][0], 1.0)
            return sum(count for _, count in self._recent) / span

    def _count(self, tokens: int) -> None:
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            self._recent.append((now, tokens))

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - SPEED_WINDOW:
            self._recent.popleft()

    def check(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The number of tokens a request may generate.

        Raises RequestError, with the figures, if it is too long.
        """
        context = self.limits.context
        if num_prompt_tokens < 1:
            raise RequestError("the prompt is empty: it must have at least one token")
        if num_prompt_tokens >= context:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, and this server's context is "
                f"{context} tokens, prompt and answer together: shorten the prompt, or start the "
                "server with a larger --context"
            )
        if max_tokens is None:
            return context - num_prompt_tokens
        if num_prompt_tokens + max_tokens > context:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, "
                f"together {num_prompt_tokens + max_tokens}, and this server's context is "
                f"{context} tokens: ask for at most {context - num_prompt_tokens}"
            )
        return max_tokens

    def _check_room(self) -> None:
        if not self.is_alive:
            raise ServerBusy("the engine has stopped: restart the server")
        if self.waiting >= self.limits.waiting:
            raise ServerBusy(f"{self.waiting} requests wait already: try again later")

    def end_all(self) -> None:
        """End every request where it is, as if it had reached its limit; from the event loop."""
        for generation in list(self._generations.values()):
            generation.progress.put_nowait(None)

    async def generate(
        self,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int,
        tell: Callable[[Reuse], None] = lambda reuse: None,
        priority: int = 0,
    ) -> AsyncIterator[list[Token]]:
        """Tokens as they come, several where the caller is slower than the engine; the end token is
        the last if there is one.

        sampling : its ``ends`` are all that end it, the model's own too. Closing the iterator
        cancels the request and frees what it held. tell : called at the end, with what of the
        prompt was not computed. priority : those of a lower one come first. Raises ServerBusy if
        too many wait or the engine has stopped, RuntimeError if the engine fails.
        """
        self._check_room()
        loop = asyncio.get_running_loop()
        own = Generation(ids, Sampler(sampling, ids), max_tokens, loop, priority)
        self._generations[own.id] = own
        given, finished = 0, False
        try:
            self._submit(own)
            while not finished:
                progress = await own.progress.get()
                while progress and progress.error is None and not own.progress.empty():
                    progress = own.progress.get_nowait()
                if progress is None:
                    return
                finished = progress.is_finished
                if progress.error is not None:
                    raise RuntimeError(f"generation failed: {progress.error}")
                tokens = own.sampler.tokens[given : progress.num_tokens]
                self._count(len(tokens))
                given = progress.num_tokens
                if tokens:
                    yield tokens
        finally:
            del self._generations[own.id]
            both = self.reuse, own.reuse
            self.reuse = Reuse(sum(r.memory for r in both), sum(r.disk for r in both))
            tell(own.reuse)
            if not finished:
                self._cancel(own)

    async def embed(self, ids: list[int]) -> torch.Tensor:
        """float32 (hidden_size,): the last token's hidden state, as the model's head takes it.

        Raises RequestError where the engine cannot, and as ``generate``.
        """
        if not self.embeds:
            reason = self.why_not_native or self.why_alone
            raise RequestError(f"hidden states are given by ktk's own layers only: {reason}")
        self._check_room()
        own = Generation(ids, Sampler(Sampling(0.0)), 0, asyncio.get_running_loop())
        self._generations[own.id] = own
        progress = None
        try:
            self._submit(own)
            progress = await own.progress.get()
        finally:
            del self._generations[own.id]
            if progress is None:
                self._cancel(own)
        if progress is None:
            raise ServerBusy("the server is shutting down")
        if progress.error is not None:
            raise RuntimeError(f"generation failed: {progress.error}")
        assert own.hidden is not None
        return own.hidden
