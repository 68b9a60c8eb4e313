"""Hashes of the store, all by XXH64 and XXH3, which are fast and no secret.

They guard against accidents: a hash that agrees is followed by a look at the tokens themselves, and
a page's checksum tells a torn, moved or decayed page. Who can write the store's files can write
checksums, too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import xxhash

SEED = 4123512  # of the prefix hashes, as kvc2 has it
DIGEST_BYTES = 16


def prefix_hashes(tokens: bytes, page_bytes: int) -> Iterator[int]:
    """XXH64 of the tokens up to each page's end, one page after the other.

    tokens : uint32, little-endian; what is left of the last page is left out.
    """
    hasher = xxhash.xxh64(seed=SEED)
    for begin in range(0, len(tokens) - page_bytes + 1, page_bytes):
        hasher.update(tokens[begin : begin + page_bytes])
        yield hasher.intdigest()


def digest(*parts: bytes) -> bytes:
    """XXH3 of 128 bits over the parts and where each one ends."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
    return hasher.digest()


def checksum(data: np.ndarray) -> bytes:
    """XXH3 of 128 bits over uint8 (bytes,)."""
    return xxhash.xxh3_128_digest(data.data)
