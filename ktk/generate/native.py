"""Generating for many requests at once by ktk's own decoder layers, over one pool of pages.

Prompts of before stay in the pool as long as there is room, and on the disk where a store keeps
them: one that begins alike is not read again. A token's bits are the same whatever else is in the
batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

import torch

from ktk.errors import BackendError
from ktk.generate.engine import (
    Engine,
    Generation,
    Limits,
    Progress,
    Reuse,
    ServerBusy,
    pages_within,
    report_all,
)
from ktk.generate.identity import cache_info
from ktk.generate.lookup import Lookup, PassCosts
from ktk.generate.open import OpenModel
from ktk.generate.sampling import places_of_largest
from ktk.generate.schedule import Piece, Schedule, Sequence
from ktk.integration.transformers.native_batch import NativeModel
from ktk.kv.pool import PagePool
from ktk.kv.prefix.kept import KeptPages
from ktk.kv.prefix.store import PrefixStore
from ktk.machine import openmp


class NativeEngine(Engine):
    """Raises CannotBatch for a model whose decoder layers do not all run natively, RequestError if
    the KV cache is too small.
    """

    embeds = True

    def __init__(self, opened: OpenModel, limits: Limits) -> None:
        super().__init__(opened, limits)
        self._native = NativeModel(self.model, kv_dtype=limits.kv_dtype)
        try:
            pages = pages_within(limits, self._native.token_bytes)
        except BaseException:
            self._native.close()
            raise
        self.cache_bytes = pages.num_bytes
        pool = PagePool(pages.count, self._native.shapes, self._native.kv_dtype)
        self._schedule: Schedule[Generation] = Schedule(
            pool, limits.running, limits.batch_tokens, limits.swap_bytes
        )
        self.swap = self._schedule.swap
        self._largest_batch = 0
        self._lookups: dict[Sequence[Generation], Lookup] = {}
        self._costs = PassCosts()
        if limits.guesses:
            self._schedule.guess = self._guess
        self._sequences: dict[str, Sequence[Generation]] = {}
        self._news: deque[Generation] = deque()  # begun or cancelled
        self._progress = list[tuple[Generation, Progress]]()  # made and not told yet
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="ktk-generation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(30)
        if self.kept is not None:
            self.kept.close()
        self._native.close()

    def keep(self, store: PrefixStore, opened: OpenModel, linear: str) -> bool:
        info = cache_info(opened, self._native, linear)
        self.kept = KeptPages(store, info, self._schedule.pool, self._wake.set)
        self._schedule.kept = self.kept
        return True

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    @property
    def running(self) -> int:
        return len(self._schedule.running)

    @property
    def cache_pages(self) -> tuple[int, int]:
        return self._schedule.pool.free, self._schedule.pool.count

    @property
    def largest_batch(self) -> int:
        return self._largest_batch

    @property
    def prefix_tokens(self) -> tuple[int, int]:
        return self._schedule.tokens_shared, self._schedule.tokens_begun

    def _submit(self, generation: Generation) -> None:
        if self._is_stopping:
            raise ServerBusy("the server is shutting down")
        self._tell(generation)

    def _cancel(self, generation: Generation) -> None:
        generation.is_cancelled = True
        self._tell(generation)

    def _tell(self, generation: Generation) -> None:
        self._news.append(generation)
        self._wake.set()

    # From here on in the generation thread.

    @openmp.own_threads()
    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            self._hear()
            pieces = self._schedule.next_pass()
            if pieces:
                self._compute(pieces)
            else:
                self._tell_all()
                self._wake.wait()
        self._tell_all()
        for sequence in [*self._schedule.running, *self._schedule.waiting]:
            sequence.owner.fail(RuntimeError("the server is shutting down"))

    def _hear(self) -> None:
        while self._news:
            generation = self._news.popleft()
            known = self._sequences.pop(generation.id, None)
            if known is not None:
                self._schedule.remove(known)
                self._lookups.pop(known, None)
            elif not generation.is_cancelled:
                try:
                    self._native.check_unchanged()
                except BackendError as error:
                    generation.fail(error)
                    continue
                tokens = list(generation.ids)
                added = self._schedule.add(generation, tokens, generation.priority)
                self._sequences[generation.id] = added

    def _compute(self, pieces: list[Piece[Generation]]) -> None:
        tokens, sequence, position, wanted = list[int](), list[int](), list[int](), list[int]()
        for index, piece in enumerate(pieces):
            end = piece.end + len(piece.guesses)
            tokens += piece.sequence.tokens[piece.first : piece.end]
            tokens += piece.guesses
            sequence += [index] * (end - piece.first)
            position += range(piece.first, end)
            if piece.is_last:
                wanted += range(len(tokens) - 1 - len(piece.guesses), len(tokens))
        tables = [piece.sequence.tables for piece in pieces]
        last = [piece for piece in pieces if piece.is_last]
        wants_hidden = any(piece.sequence.owner.is_embedding for piece in last)
        start = time.perf_counter()
        try:
            given = (tokens, sequence, position, tables, wanted or [0])
            logits, hidden = self._native.forward(*given, wants_hidden, self._tell_all)
        except Exception as error:  # no memory, a disk that fails: these requests end, not the rest
            for piece in pieces:
                self._fail(piece.sequence, error)
            return
        if len(last) == len(pieces):
            self._costs.add(len(tokens), time.perf_counter() - start)
        self._largest_batch = max(self._largest_batch, len(last))
        for piece in pieces:
            self._schedule.done(piece)
        is_largest = [piece.sequence.owner.sampler.takes_largest for piece in last]
        largest = places_of_largest(logits) if any(is_largest) else []
        row = 0
        for piece, takes_largest in zip(last, is_largest, strict=True):
            owner, rows = piece.sequence, 1 + len(piece.guesses)
            try:
                if owner.owner.is_embedding:
                    progress = self._give(owner, hidden[row].float())
                elif takes_largest:
                    progress = self._take_all(piece, largest[row : row + rows])
                else:
                    progress = self._take_all(piece, logits[row : row + rows])
                self._progress.append((owner.owner, progress))
            except Exception as error:  # whatever it was, the batch goes on without this request
                self._fail(owner, error)
            row += rows

    def _take_all(self, piece: Piece[Generation], rows: Iterable[torch.Tensor | int]) -> Progress:
        """Tokens from a sequence's rows in turn, as long as each was the one guessed.

        rows : logits, or the places of their largest, where these are all that the sampler wants.
        """
        sequence, came_true = piece.sequence, 0
        sampler, lookup = sequence.owner.sampler, self._lookups.get(sequence)
        for row in rows:
            if isinstance(row, int):
                token = sampler.take_largest(row)
            else:
                token = sampler.choose(row.float())
            progress = self._take(sequence, token)
            if progress.is_finished or came_true == len(piece.guesses):
                break
            if token != piece.guesses[came_true]:
                break
            self._schedule.accept(sequence)
            came_true += 1
        if lookup is not None and piece.guesses:
            lookup.learn(len(piece.guesses), came_true)
            self.guessed += len(piece.guesses)
            self.came_true += came_true
        return progress

    def _guess(self, sequence: Sequence[Generation], rows: int) -> list[int]:
        """For ``Schedule.guess``."""
        lookup = self._lookups.get(sequence)
        if lookup is None:
            lookup = self._lookups[sequence] = Lookup(sequence.tokens, self.limits.guesses)
        return lookup.guess(self._costs.share_of_row(rows), rows)

    def _tell_all(self) -> None:
        """Tell the event loop what the last pass has given: while the next one runs, as both need
        Python.
        """
        news, self._progress = self._progress, []
        report_all(news)

    def _take(self, sequence: Sequence[Generation], token: int) -> Progress:
        own = sequence.owner
        sequence.tokens.append(token)
        made = len(own.sampler.tokens)
        if made == 1:
            own.reuse = Reuse(sequence.shared, sequence.loaded)
        is_finished = token in own.ends or made >= own.max_tokens
        if is_finished:
            self._end(sequence)
        return Progress(made, is_finished)

    def _give(self, sequence: Sequence[Generation], hidden: torch.Tensor) -> Progress:
        self._end(sequence)
        sequence.owner.hidden = hidden
        return Progress(0, True)

    def _fail(self, sequence: Sequence[Generation], error: Exception) -> None:
        self._end(sequence)
        sequence.owner.fail(error)

    def _end(self, sequence: Sequence[Generation]) -> None:
        self._schedule.remove(sequence)
        self._lookups.pop(sequence, None)
        self._sequences.pop(sequence.owner.id, None)
