"""Pages of keys and values: sequences that share one cache take pages of it as they grow."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 64  # tokens; small pages waste little on short sequences


@dataclass(frozen=True)
class Pages:
    """count pages of PAGE tokens each.

    token_bytes : of the keys and values of one token in all layers.
    """

    count: int
    token_bytes: int

    @classmethod
    def within(cls, cache_bytes: int, token_bytes: int, context: int, sequences: int) -> Pages:
        """As many as fit into cache_bytes, and no more than so many sequences of context tokens
        can fill.
        """
        # Two pages more than the context: a sequence's last page, and one that is being filled.
        enough = sequences * (context // PAGE + 2)
        return cls(int(min(enough, cache_bytes // (PAGE * token_bytes))), token_bytes)

    @property
    def num_tokens(self) -> int:
        return self.count * PAGE

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.token_bytes


def pages_beyond(end: int, tokens: int) -> int:
    """Full pages of a sequence's tokens up to end,
    those left out that hold its first tokens and nothing else.
    """
    return max(0, end // PAGE - tokens // PAGE)
