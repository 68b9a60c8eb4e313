"""One sequence of a model whose decoder layers run natively: prompts and tokens without generate().

Prompts go through ktk's layers, too: of SmolLM2 as a mixture twice as fast as through torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from ktk.errors import CheckpointError
from ktk.integration.transformers.batches import CannotBatch
from ktk.integration.transformers.native_batch import NativeModel
from ktk.integration.transformers.native_call import DTYPES
from ktk.integration.transformers.sequence import (
    CachedSequence,
    common_length,
    longest_context,
    prefill_chunk,
)
from ktk.kv.dtypes import KV_DTYPES
from ktk.kv.pages import PAGE
from ktk.kv.pool import PagePool
from ktk.kv.prefix.config import CacheInfo
from ktk.kv.prefix.store import PrefixStore
from ktk.log import warn_once
from ktk.machine import openmp
from ktk.ops.decoder import PageTables

LONGEST = 1 << 20  # tokens, of a model that does not say
# Tokens by which both ways are compared: none of the first, which are special. Of those SmolLM2's
# log probabilities are chaotic, 6 nats apart by rounding alone.
PROBE = list(range(300, 356, 7))
LIKELY, TOLERANCE = 20, 0.25  # log probabilities that are compared, and nats between them


class Guesser(Protocol):
    """Guesses what a text's next tokens are."""

    def begin(self, tokens: list[int]) -> None:
        """A text, which grows."""

    def guess(self) -> list[int]:
        """What may follow it."""

    def learn(self, guessed: int, came_true: int, seconds: float) -> None:
        """What became of the guesses of one pass, and what it took."""


class NativeSequence:
    """``CachedSequence`` for such a model: same arguments, same meaning. kv_dtype : as of
    ``NativeModel``.

    Raises CannotBatch where ``NativeModel`` does.
    """

    def __init__(self, model: Any, kv_dtype: str | None = None) -> None:
        self.model = model
        self.native = NativeModel(model, is_invariant=False, kv_dtype=kv_dtype)
        self.longest = longest_context(model)
        pages = (self.longest or LONGEST) // PAGE + 1
        self._pool = PagePool(pages, self.native.shapes, self.native.kv_dtype)
        self.cached: list[int] = []
        self._pages: list[int] = []
        self._tables = PageTables()
        self._store: PrefixStore | None = None
        self._info: CacheInfo | None = None

    def keep(self, store: PrefixStore, info: CacheInfo) -> None:
        """Take pages that a prompt begins with from a store, and let ``save`` put them there.

        info : of the model as it runs here, in pages of PAGE tokens.
        """
        self._store, self._info = store, info

    def save(self) -> None:
        """Bring the full pages of the sequence to the store, if there is one.

        What keeps them from it is one warning.
        """
        if self._store is None or self._info is None:
            return

        def fill(index: int, frame: np.ndarray) -> bool:
            self._pool.read(self._pages[index], frame)
            return True

        try:
            self._store.insert_pages(self._info, self._whole(self.cached, 0), fill)
        except (OSError, CheckpointError) as error:
            warn_once("kv-save", "KV pages are not saved: %s", error)

    def _load(self, ids: list[int]) -> None:
        """Take pages from the store behind those cached. At least one token is left."""
        known, wanted = len(self.cached) // PAGE, self._whole(ids, 1)
        if self._store is None or self._info is None or len(wanted) <= known * PAGE:
            return
        for index, frame in enumerate(self._store.read_pages(self._info, wanted, known), known):
            self._make_room((index + 1) * PAGE)
            self._pool.copy_in(self._pages[index], frame)
            if len(self.cached) < (index + 1) * PAGE:
                self.cached = ids[: (index + 1) * PAGE]

    @staticmethod
    def _whole(tokens: list[int], left: int) -> np.ndarray:
        """Those of whole pages, so that ``left`` remain at least."""
        return np.array(tokens[: max(0, len(tokens) - left) // PAGE * PAGE], np.int64)

    def reset(self) -> None:
        """Forget the keys and values."""
        self._pool.give_back(self._pages)
        self._pages, self._tables, self.cached = [], PageTables(), []

    @openmp.own_threads()
    def generate(
        self,
        ids: list[int],
        max_tokens: int,
        choose: Callable[[torch.Tensor], int],
        receive: Callable[[int], bool],
        is_stopped: Callable[[], bool],
        guesser: Guesser | None = None,
    ) -> int:
        """As ``CachedSequence.generate``.

        guesser : its guesses are computed in the pass of the token before, and stand where
            ``choose`` chooses them. Logits have the same bits without it.
        """
        self.native.check_unchanged()
        del self.cached[common_length(self.cached, ids[:-1]) :]
        self._load(ids)
        prefilled = len(ids) - len(self.cached)
        tokens, end, many = list(ids), len(ids) + max_tokens, prefill_chunk(self.model)
        if guesser is not None:
            guesser.begin(tokens)
        while len(tokens) < end and not is_stopped():
            if guesser is not None and self.native.plain and len(tokens) > len(ids):
                if self._guessed(tokens, end, choose, receive, guesser):
                    break
                continue
            chunk = tokens[len(self.cached) :][:many]
            logits = self.logits(chunk)
            if len(self.cached) == len(tokens):
                tokens.append(choose(logits))
                if receive(tokens[-1]):
                    break
        return prefilled

    @torch.inference_mode()
    def _guessed(
        self,
        tokens: list[int],
        end: int,
        choose: Callable[[torch.Tensor], int],
        receive: Callable[[int], bool],
        guesser: Guesser,
    ) -> bool:
        """A pass of the last token and of guesses behind it: whether the text has ended.

        The norm and the head run row by row, as without guesses: of several rows torch's products
        may round otherwise.
        """
        plain = self.native.plain
        assert plain is not None
        start, first = time.perf_counter(), len(self.cached)
        guesses = guesser.guess()[: end - len(tokens) - 1]
        given = [tokens[-1], *guesses]
        self._make_room(first + len(given))
        places = list(range(first, first + len(given)))
        rows = plain.rows(given, [0] * len(given), places, [self._tables])
        is_last, came_true = False, 0
        for place, row in enumerate(rows):
            token = choose(plain.logits(row).float())
            tokens.append(token)
            self.cached.append(given[place])
            is_last = receive(token)
            if is_last or place == len(guesses) or token != guesses[place]:
                break
            came_true += 1
        guesser.learn(len(guesses), came_true, time.perf_counter() - start)
        return is_last

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Float32 (vocab_size,) behind tokens that follow those cached, and are cached now."""
        first, end = len(self.cached), len(self.cached) + len(tokens)
        self._make_room(end)
        places = list(range(first, end))
        of_rows = [0] * len(tokens)
        logits, _ = self.native.forward(tokens, of_rows, places, [self._tables], [len(tokens) - 1])
        self.cached += tokens
        return logits[0].float()

    def _make_room(self, tokens: int) -> None:
        if tokens <= len(self._pages) * PAGE:
            return
        while tokens > len(self._pages) * PAGE:
            page = self._pool.take()
            if page is None:
                raise ValueError(f"{tokens} tokens: the model's context is {self.longest}")
            self._pages.append(page)
        self._tables = self._pool.tables(self._pages)


def open_sequence(model: Any, kv_dtype: str | None = None) -> NativeSequence | CachedSequence:
    """The fastest that gives what the model's own forward passes give, which is tried.

    kv_dtype : as of ``NativeModel``. Raises ValueError for another one than the model's where its
    layers do not run natively.
    """
    text = model.config.get_text_config()
    probe = [token % text.vocab_size for token in PROBE]
    expected: list[torch.Tensor] = []

    def keep(logits: torch.Tensor) -> int:
        expected.append(logits.log_softmax(-1))
        return int(logits.argmax())

    CachedSequence(model).generate(probe, 2, keep, lambda _: False, lambda: False)
    try:
        sequence = NativeSequence(model, kv_dtype)
    except CannotBatch as error:
        check_own_dtype(model, kv_dtype, str(error))
        return CachedSequence(model)
    found = sequence.logits(probe).log_softmax(-1)
    sequence.reset()
    most, ids = expected[0].topk(min(LIKELY, len(expected[0])))
    if bool((found[ids] - most).abs().max() <= TOLERANCE):
        return sequence
    check_own_dtype(model, kv_dtype, "on a short text they differ from the model's own")
    return CachedSequence(model)


def check_own_dtype(model: Any, kv_dtype: str | None, reason: str) -> None:
    """Raises ValueError if keys and values of a model whose layers torch runs, for a reason, are to
    be kept in another dtype than its own.
    """
    if kv_dtype is not None and DTYPES.get(model.dtype) != KV_DTYPES[kv_dtype]:
        raise ValueError(
            f"--kv-dtype {kv_dtype} is for models whose layers ktk runs, and torch runs this one's "
            f"({reason}): leave it out"
        )
