"""Tokens to text while they come: whole characters only, and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ktk.integration.transformers.tokens import decode, special_tokens

REPLACEMENT = "�"  # what a decoder gives for bytes that are no whole character (yet)


class Detokenizer:
    """The text of a growing list of tokens, special tokens left out unless they are kept.

    Text is given out once it can no longer change: when it does not end in an unfinished character.
    """

    def __init__(self, tokenizer: Any, keeps_special: bool = False) -> None:
        self._tokenizer, self._keeps_special = tokenizer, keeps_special
        self._ids: list[int] = []
        # Decoding starts some tokens back, since a token's text may depend on the one before it
        # (leading spaces).
        self._start = 0
        self._given = 0  # of _ids, how many are in the text given out

    def add(self, token: int) -> str:
        """The text that became certain with one more token; "" while a character is unfinished."""
        self._ids.append(token)
        return self._text(final=False)

    def finish(self) -> str:
        """What is left at the end; an unfinished character as U+FFFD."""
        return self._text(final=True)

    def _text(self, final: bool) -> str:
        given, every = self._ids[self._start : self._given], self._ids[self._start :]
        before = decode(self._tokenizer, given, self._keeps_special)
        now = decode(self._tokenizer, every, self._keeps_special)
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return now[len(before) :]


class StopStrings:
    """Cuts a text that comes in pieces before the first of some strings,
    or behind it if that is included.
    """

    def __init__(self, strings: Sequence[str], is_included: bool = False) -> None:
        self._strings = [s for s in strings if s]
        self._is_included = is_included
        self._held = ""  # what may be the beginning of a stop string
        self.found = False
        self.which: str | None = None  # was found

    def add(self, text: str) -> str:
        """What of the text so far is certainly wanted and was not given out yet;
        sets ``found`` at a stop string.
        """
        if self.found:
            return ""
        text = self._held + text
        # The one that is complete first, as if the text had come letter by letter.
        places = [(p + len(s), p, s) for s in self._strings if (p := text.find(s)) >= 0]
        if places:
            self.found, self._held = True, ""
            end, begin, self.which = min(places)
            return text[: end if self._is_included else begin]
        held = max((_overlap(text, s) for s in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of ``stop`` that ``text`` ends in."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def stop_tokens(tokenizer: Any, strings: Sequence[str]) -> tuple[frozenset[int], list[str]]:
    """Stop strings that are the text of a special token, as tokens, since texts leave those out;
    and the others.

    Raises ValueError for one that has such a text in it and more: no text has it.
    """
    special = special_tokens(tokenizer)
    tokens, others = set(), []
    for string in strings:
        if string in special:
            tokens.add(special[string])
            continue
        if inside := next((text for text in special if text and text in string), None):
            raise ValueError(
                f"stop={string!r:.80}: has the special token {inside!r} in it, which is no part "
                f"of the text; give {inside!r} alone"
            )
        others.append(string)
    return frozenset(tokens), others
