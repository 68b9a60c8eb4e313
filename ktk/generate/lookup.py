"""Guesses of an answer's next tokens from its own text: what followed the last time that the same
few tokens came.

Guesses are computed as more rows of the sequence in a pass. The sampler chooses from each row in
turn, as without them; where it chooses what was guessed, the next row stands, too. So the tokens
are the same, and a pass gives several. A row costs time, so as many are guessed as pay: by how
often a sequence's guesses came true, and by what passes of more rows were measured to take.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must have come before
MOST = 8  # guesses for one sequence in a pass
HALF_LIFE = 16  # guesses after which an earlier one counts half
PROBE_EVERY = 24  # tokens after which one that does not pay is tried again
FIRST_RATE = 0.7  # of guesses that come true, before any was tried


class PassCosts:
    """Seconds of passes by their rows, as a straight line through those of late."""

    FADING = 0.98  # weight of a pass against the next
    PRIOR = 0.25  # of a pass of one row, what another row takes, until passes of others were seen

    def __init__(self) -> None:
        self._count = self._rows = self._squares = self._seconds = self._products = 0.0

    def add(self, rows: int, seconds: float) -> None:
        fading = self.FADING
        self._count = self._count * fading + 1.0
        self._rows = self._rows * fading + rows
        self._squares = self._squares * fading + rows * rows
        self._seconds = self._seconds * fading + seconds
        self._products = self._products * fading + rows * seconds

    def share_of_row(self, rows: int) -> float:
        """What one more row takes, of the time of a pass of so many."""
        if not self._count:
            return self.PRIOR / (1 + self.PRIOR * (rows - 1))
        mean, seconds = self._rows / self._count, self._seconds / self._count
        spread = self._squares / self._count - mean * mean
        if spread < 0.05:
            row = self.PRIOR / (1 + self.PRIOR * (mean - 1)) * seconds
        else:
            row = max(0.0, (self._products / self._count - mean * seconds) / spread)
        whole = seconds + row * (rows - mean)
        return row / whole if whole > 0 else 1.0


class LoneLookup:
    """Guesses for one sequence after another, each alone in its passes. most : in a pass."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._costs = most, PassCosts()
        self._lookup = Lookup([], most)
        self.guessed = self.came_true = 0  # tokens, of the last text

    def begin(self, tokens: Sequence[int]) -> None:
        """A text, which grows."""
        self._lookup = Lookup(tokens, self._most)
        self.guessed = self.came_true = 0

    def guess(self) -> list[int]:
        """What may follow it, as many tokens as pay."""
        return self._lookup.guess(self._costs.share_of_row(1), 1)

    def learn(self, guessed: int, came_true: int, seconds: float) -> None:
        """What became of the guesses of one pass, and what it took."""
        self._costs.add(1 + guessed, seconds)
        self._lookup.learn(guessed, came_true)
        self.guessed += guessed
        self.came_true += came_true


class Lookup:
    """One sequence's guesses. most : in a pass; 0: none. tokens : prompt and answer; it may grow,
    nothing else.
    """

    def __init__(self, tokens: Sequence[int], most: int = MOST) -> None:
        self._tokens, self._most = tokens, most
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> the place behind them
        self._seen = 0  # places that are in it
        self._came_true, self._tried = FIRST_RATE * 4, 4.0
        self._silent_since = 0

    @property
    def rate(self) -> float:
        """Of guesses of late that could come true, the share that did."""
        return self._came_true / self._tried

    def guess(self, share_of_row: float, tokens_of_pass: int) -> list[int]:
        """The tokens that may come, as many as pay.

        share_of_row : of the pass' time, that a row takes. tokens_of_pass : that it gives without.
        """
        least = share_of_row * tokens_of_pass  # a token's worth: so much of a pass
        count, chance = 0, self.rate
        while count < self._most and chance > least:
            count, chance = count + 1, chance * self.rate
        length = len(self._tokens)
        if not count and self._most and length - self._silent_since >= PROBE_EVERY:
            count = 1
        found = self._behind(count) if count else []
        if found:
            self._silent_since = length
        return found

    def _behind(self, count: int) -> list[int]:
        tokens, length = self._tokens, len(self._tokens)
        for end in range(max(NGRAM, self._seen + 1), length):  # the last place is looked for
            self._after[tuple(tokens[end - NGRAM : end])] = end
        self._seen = max(self._seen, length - 1)
        place = self._after.get(tuple(tokens[length - NGRAM :]))
        found: list[int] = []
        while place is not None and len(found) < count:  # what repeats goes on in the guesses
            found.append(tokens[place] if place < length else found[place - length])
            place += 1
        return found

    def learn(self, guessed: int, came_true: int) -> None:
        """What became of guesses; none behind the first wrong one was tried."""
        fading = 0.5 ** (1 / HALF_LIFE)
        for place in range(min(guessed, came_true + 1)):
            self._tried = self._tried * fading + 1
            self._came_true = self._came_true * fading + (place < came_true)
