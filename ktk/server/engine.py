"""The engine of the server: transformers' continuous batching, with sampling, limits and cancellation of each request's own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
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
from ktk.integration.transformers.generation import end_tokens
from ktk.integration.transformers.open import DTYPE_BYTES, OpenModel, kv_bytes_per_token, size
from ktk.integration.transformers.sampling import Sampler, Sampling, Token, only
from ktk.server.attention import NAME, pad_rows, paged_attention

PAGE = 64  # tokens; small pages waste little on short sequences
SPEED_WINDOW = 10.0  # seconds over which tokens/s is taken


class RequestError(KtkError, ValueError):
    """A request that this engine cannot take; its message is for the client."""


class ServerBusy(KtkError, RuntimeError):
    """The engine cannot take a request now."""


@dataclass(frozen=True)
class Limits:
    """context : tokens of one sequence, prompt and answer. running : sequences of a batch; waiting : requests beyond.

    batch_tokens : of one forward pass. cache_bytes : of keys and values of all sequences together.
    """

    context: int
    running: int = 16
    waiting: int = 256
    batch_tokens: int = 512
    cache_bytes: int = 2 << 30


class _Samplers(ContinuousBatchingLogitsProcessorList):
    """Stands where the manager has processors that all requests share, and asks each request's own Sampler.

    Used by the generation thread; ``samplers`` is filled by the event loop.
    """

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.samplers: dict[str, Sampler] = {}
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
            sampler = self.samplers.get(request_id)  # None: cancelled since the batch was made
            chosen.append(0 if sampler is None else sampler.choose(scores[row]))
        return only(scores, chosen)


class _Router(OutputRouter):
    """Hands outputs to the requests that wait for them. Those of cancelled requests are dropped, not kept in a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = {}

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            entry = self.waiting.get(output.request_id)
            if entry is not None:
                loop, queue = entry
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(queue.put_nowait, output)


class Engine:
    """Generates for many requests at once. ``start`` before the first one, ``stop`` at the end.

    Raises RequestError for a model whose attention transformers cannot batch.
    """

    def __init__(self, opened: OpenModel, limits: Limits) -> None:
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.limits = limits
        self.eos = end_tokens(self.model, self.tokenizer)
        self._samplers, self._router = _Samplers(), _Router()
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        self._hook = self.model.register_forward_pre_hook(pad_rows, with_kwargs=True)
        text = self.model.config.get_text_config().to_dict()
        element = DTYPE_BYTES[str(self.model.dtype).removeprefix("torch.")]
        page_bytes = PAGE * max(1, kv_bytes_per_token(text, element))
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

    def _make_manager(self, pages: int) -> Any:
        if self.model._supports_sdpa:
            AttentionInterface.register(NAME, paged_attention)
            # Not by set_attn_implementation: it would look for the flash-attn package.
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
            raise RequestError(
                f"transformers cannot batch {type(self.model).__name__} ({error}); `ktk run` and `ktk chat` run it"
            ) from error
        manager.logit_processor = self._samplers
        manager.output_router = self._router
        return manager

    def start(self) -> None:
        """Start the generation thread, and wait until it has its KV cache. Raises RequestError if it cannot."""
        self._manager.start()
        while self._manager.batch_processor is None and self._manager.is_running():
            time.sleep(0.01)
        if not self.is_alive:
            error = self._manager.background_thread_status.fatal_error
            raise RequestError(f"transformers cannot batch {type(self.model).__name__}: {error}")

    def stop(self) -> None:
        """End the generation thread; requests that still run fail."""
        self._hook.remove()
        self._manager.stop(block=True, timeout=30, hard_stop=True)

    @property
    def is_alive(self) -> bool:
        return bool(
            self._manager.is_running()
            and self._manager.background_thread_status.fatal_error is None
        )

    @property
    def running(self) -> int:
        """Sequences being generated."""
        processor = self._manager.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    @property
    def unfinished(self) -> int:
        """Requests that somebody waits for."""
        return len(self._router.waiting)

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return max(0, len(self._router.waiting) - self.running)

    @property
    def cache_pages(self) -> tuple[int, int]:
        """(free, all) pages of the KV cache; pages kept for a following prompt of the same beginning count as free."""
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
        """The number of tokens a request may generate. Raises RequestError, with the figures, if it is too long."""
        context = self.limits.context
        if num_prompt_tokens < 1:
            raise RequestError("the prompt is empty: it must have at least one token")
        if num_prompt_tokens >= context:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens, and this server's context is {context} tokens, prompt and "
                f"answer together: shorten the prompt, or start the server with a larger --context"
            )
        if max_tokens is None:
            return context - num_prompt_tokens
        if num_prompt_tokens + max_tokens > context:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together "
                f"{num_prompt_tokens + max_tokens}, and this server's context is {context} tokens: "
                f"ask for at most {context - num_prompt_tokens}"
            )
        return max_tokens

    def end_all(self) -> None:
        """End every request where it is, as if it had reached its limit; from the event loop."""
        for _, queue in list(self._router.waiting.values()):
            queue.put_nowait(None)

    async def generate(
        self, ids: list[int], sampling: Sampling, max_tokens: int
    ) -> AsyncIterator[list[Token]]:
        """Tokens as they come, several where the caller is slower than the engine; the end token is the last if there is one.

        Closing the iterator cancels the request and frees what it held. Raises ServerBusy if too many wait or the engine
        has stopped, RuntimeError if the engine fails.
        """
        if not self.is_alive:
            raise ServerBusy("the engine has stopped: restart the server")
        if self.waiting >= self.limits.waiting:
            raise ServerBusy(f"{self.waiting} requests wait already: try again later")
        request_id = uuid.uuid4().hex
        queue: asyncio.Queue[Any] = asyncio.Queue()
        sampler = Sampler(sampling)
        self._samplers.samplers[request_id] = sampler
        self._router.waiting[request_id] = (asyncio.get_running_loop(), queue)
        given, finished = 0, False
        try:
            if (
                self._manager.add_request(
                    ids, request_id, max_tokens, streaming=True, eos_token_id=sorted(self.eos)
                )
                is None
            ):
                raise ServerBusy("the server is shutting down")
            while not finished:
                output = await queue.get()
                while output is not None and not queue.empty():
                    output = queue.get_nowait()
                if output is None:
                    return
                if output.error is not None:
                    finished = True
                    raise RuntimeError(f"generation failed: {output.error}")
                finished = output.is_finished()
                made = len(output.generated_tokens)
                tokens = sampler.tokens[given:made]
                self._count(len(tokens))
                given = made
                if tokens:
                    yield tokens
        finally:
            del self._samplers.samplers[request_id]
            del self._router.waiting[request_id]
            if not finished:
                self._manager.cancel_request(request_id)
