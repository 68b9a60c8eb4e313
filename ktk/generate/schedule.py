"""``Schedule``: which rows of which sequences the next pass computes, and who holds which pages.

Every sequence that makes an answer gets its row of every pass. What is left of a pass goes to
prompts: half to the one that came first, so that each ends, the rest to the shortest, so that a
short question does not wait for a long text. While answers are made, prompts get a part of a pass
only: an answer's next token waits for the whole pass.

Sequences of a lower priority come before all of a higher one: when they wait, when their prompts
share a pass, and where pages run out. "First" and "last" below are in this order.

Where pages run out, the sequence that came last gives its own back. It takes copies of them along
where there is room for these (``ktk/kv/swap.py``); else it is computed again later. Its bits stay:
they do not depend on how rows are joined to passes.

Pages on the disk that a sequence begins with come while others are computed; a pass begins with
putting into the pool what has come.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ktk.kv.pages import PAGE
from ktk.kv.pool import NOTHING, PagePool
from ktk.kv.prefix.kept import Fetch, KeptPages
from ktk.kv.swap import Swapped, SwapSpace
from ktk.ops.decoder import PageTables

PROMPT_SHARE = 4  # beside answers, prompts get one part in so many of a pass
LEAST_PROMPT = 32  # rows, or more

Owner = TypeVar("Owner")


@dataclass(eq=False)
class Sequence(Generic[Owner]):
    """A prompt and its answer. tokens : of both. turn : its priority, and how many came before it;
    the lower comes first. computed : of them, whose keys and values are in
    the pages. shared : of them, that were there when it began; loaded : that came from the disk.
    fetch : of those that are still to come; nothing is computed before. swapped : while it waits,
    what it took along.
    """

    owner: Owner
    tokens: list[int]
    turn: tuple[int, int] = (0, 0)
    computed: int = 0
    shared: int = 0
    loaded: int = 0
    fetch: Fetch | None = None
    swapped: Swapped | None = None
    pages: list[int] = field(default_factory=list)
    content: int = NOTHING  # of the last page that is full
    tables: PageTables = field(default_factory=PageTables)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed


@dataclass(slots=True)
class Piece(Generic[Owner]):
    """Rows [first, end) of a sequence in a pass. guesses : tokens of rows behind them."""

    sequence: Sequence[Owner]
    first: int
    end: int
    guesses: tuple[int, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.end == len(self.sequence.tokens)


def _turn(sequence: Sequence[Any]) -> tuple[int, int]:
    return sequence.turn


class Schedule(Generic[Owner]):
    """pool : of its pages; a sequence alone must fit into it. running : sequences at once.
    batch_tokens : of a pass. swap_bytes : for pages of sequences that were put off. kept : where
    pages are that have left the pool, if anywhere. guess : (sequence, rows of the pass without
    guesses) -> tokens that may follow, if anybody guesses.
    """

    kept: KeptPages | None = None
    guess: Callable[[Sequence[Owner], int], list[int]] | None = None

    def __init__(
        self, pool: PagePool, running: int, batch_tokens: int, swap_bytes: int = 0
    ) -> None:
        self.pool, self.most_running, self.batch_tokens = pool, running, batch_tokens
        self.swap = SwapSpace(pool, swap_bytes)
        self.running: list[Sequence[Owner]] = []  # both by their turns
        self.waiting: list[Sequence[Owner]] = []
        self._num_added = 0
        # Of sequences when their turn came, again after they were put off without their pages.
        self.tokens_begun = self.tokens_shared = 0

    def add(self, owner: Owner, tokens: list[int], priority: int = 0) -> Sequence[Owner]:
        """A sequence that waits for its turn; ``tokens`` grow by the answer."""
        sequence = Sequence(owner, tokens, (priority, self._num_added))
        self._num_added += 1
        insort(self.waiting, sequence, key=_turn)
        return sequence

    def remove(self, sequence: Sequence[Owner]) -> None:
        """Whether it waits, runs or has ended: its pages are free."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self._forget_swapped(sequence)

    def next_pass(self) -> list[Piece[Owner]]:
        """What to compute next, each sequence's pages at hand; nothing if nobody waits."""
        self._admit()
        for sequence in [sequence for sequence in self.running if sequence.fetch is not None]:
            self._receive(sequence)
        shares = self._shares()
        pieces, are_fewer = list[Piece[Owner]](), False  # than ran when the pass began
        guesses = self._guesses(shares)
        for sequence in list(self.running):  # pages go from the last to those before: not in pieces
            rows = shares.get(sequence, 0)
            if not rows or (are_fewer and sequence not in self.running):
                continue
            first, end = sequence.computed, sequence.computed + rows
            if end > len(sequence.pages) * PAGE or not sequence.tables:
                had = len(self.running)
                if not self._take_pages(sequence, end):
                    are_fewer = True
                    continue
                are_fewer = are_fewer or len(self.running) < had
            guessed = guesses.get(sequence, ())
            room = len(sequence.pages) * PAGE - end  # for a guess no page is taken
            pieces.append(Piece(sequence, first, end, tuple(guessed[:room])))
        return pieces

    def _guesses(self, shares: dict[Sequence[Owner], int]) -> dict[Sequence[Owner], list[int]]:
        """For sequences that make an answer, what may follow."""
        found: dict[Sequence[Owner], list[int]] = {}
        if self.guess is not None:
            rows = sum(shares.values())
            left = self.batch_tokens - rows
            for sequence in shares:
                if sequence.pending == 1:
                    found[sequence] = self.guess(sequence, rows)[:left]
                    left -= len(found[sequence])
        return found

    def done(self, piece: Piece[Owner]) -> None:
        """A piece was computed."""
        sequence = piece.sequence
        if piece.end // PAGE > piece.first // PAGE:
            for index in range(piece.first // PAGE, piece.end // PAGE):
                self._keep(sequence, index)
        sequence.computed = piece.end

    def accept(self, sequence: Sequence[Owner]) -> None:
        """The sequence's last token is the next one that was guessed: its row is computed."""
        sequence.computed += 1
        if sequence.computed % PAGE == 0:
            self._keep(sequence, sequence.computed // PAGE - 1)

    def _keep(self, sequence: Sequence[Owner], index: int) -> None:
        tokens = sequence.tokens[index * PAGE : (index + 1) * PAGE]
        sequence.content = self.pool.keep(sequence.pages[index], sequence.content, tokens)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.most_running:
            sequence = self.waiting[0]
            sequence.pages, sequence.content = self.pool.match(sequence.tokens)
            missing = len(sequence.tokens) // PAGE + 1 - len(sequence.pages)
            if self.running and missing > self.pool.free:
                self.pool.give_back(sequence.pages)
                sequence.pages = []
                return
            self.waiting.pop(0)
            sequence.tables = PageTables()
            if sequence.swapped is not None:
                self._bring_back(sequence, sequence.swapped)
            else:
                sequence.computed = sequence.shared = len(sequence.pages) * PAGE
                self.tokens_begun += len(sequence.tokens)
                self.tokens_shared += sequence.shared
                sequence.loaded = 0
            if self.kept is not None and sequence.computed == len(sequence.pages) * PAGE:
                sequence.fetch = self.kept.find(sequence.tokens, len(sequence.pages))
            insort(self.running, sequence, key=_turn)

    def _bring_back(self, sequence: Sequence[Owner], swapped: Swapped) -> None:
        """Put what a sequence took along behind the pages that the pool still has of it."""
        sequence.computed = max(swapped.computed, len(sequence.pages) * PAGE)
        for index in range(len(sequence.pages), len(swapped.frames)):
            page = self.pool.take()
            assert page is not None  # it was admitted because there are as many
            self.swap.bring(swapped, index, page)
            sequence.pages.append(page)
            if (index + 1) * PAGE <= swapped.computed:
                self._keep(sequence, index)
        self._forget_swapped(sequence)

    def _receive(self, sequence: Sequence[Owner]) -> None:
        """Put the pages into the pool that have come for a sequence."""
        if sequence.fetch is None:
            return
        frames = sequence.fetch.take()
        if frames and not self._take_pages(sequence, sequence.computed + len(frames) * PAGE):
            return
        for frame in frames:
            index = sequence.computed // PAGE
            self.pool.copy_in(sequence.pages[index], frame)
            sequence.computed += PAGE
            self._keep(sequence, index)
            sequence.loaded += PAGE
            self.tokens_shared += PAGE
        if sequence.fetch is not None and sequence.fetch.is_done:
            sequence.fetch = None

    def _shares(self) -> dict[Sequence[Owner], int]:
        ready = [sequence for sequence in self.running if sequence.fetch is None]
        shares = {sequence: 1 for sequence in ready if sequence.pending == 1}
        prompts = [sequence for sequence in ready if sequence.pending > 1]
        left = self.batch_tokens - len(shares)
        if shares:
            left = min(left, max(LEAST_PROMPT, self.batch_tokens // PROMPT_SHARE))
        for sequence, most in self._of_prompts(prompts, left):
            rows = min(sequence.pending - shares.get(sequence, 0), most, left)
            if rows > 0:
                shares[sequence] = shares.get(sequence, 0) + rows
                left -= rows
        return shares

    @staticmethod
    def _of_prompts(
        prompts: list[Sequence[Owner]], rows: int
    ) -> Iterator[tuple[Sequence[Owner], int]]:
        """(prompt, rows at most), in the order in which they may take what is left."""
        if prompts:
            yield prompts[0], (rows + 1) // 2
        for sequence in sorted(prompts, key=lambda s: (s.turn[0], s.pending)):
            yield sequence, rows

    def _take_pages(self, sequence: Sequence[Owner], tokens: int) -> bool:
        """Pages for so many tokens; False if it had to give its own back."""
        wanted = -(-tokens // PAGE)
        grows = len(sequence.pages) < wanted
        while len(sequence.pages) < wanted:
            page = self.pool.take()
            if page is None:
                last = self.running[-1]
                self._put_off(last)
                if last is sequence:
                    return False
            else:
                sequence.pages.append(page)
        if grows or not sequence.tables:
            sequence.tables = self.pool.tables(sequence.pages)
        return True

    def _put_off(self, sequence: Sequence[Owner]) -> None:
        self.running.remove(sequence)
        sequence.swapped = self.swap.put(sequence.pages, sequence.computed)
        self._release(sequence)
        insort(self.waiting, sequence, key=_turn)

    def _forget_swapped(self, sequence: Sequence[Owner]) -> None:
        if sequence.swapped is not None:
            self.swap.forget(sequence.swapped)
            sequence.swapped = None

    def _release(self, sequence: Sequence[Owner]) -> None:
        if sequence.fetch is not None:
            sequence.fetch.cancel()
        if self.kept is not None:
            self.kept.offer(sequence.content)
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.tables, sequence.computed = [], PageTables(), 0
        sequence.fetch, sequence.content = None, NOTHING
