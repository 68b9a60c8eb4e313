"""A place in a GGUF header that moves forward, checked at every step."""

from __future__ import annotations

import struct

MAX_HEADER = 100_000_000  # bytes; real ones, tokenizer included, have 5 to 30 million

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class Malformed(Exception):
    """What is wrong inside a file, byte position included; the caller adds the file."""


class Cursor:
    """A place in a header, moving forward; every step is checked against the end."""

    def __init__(self, data: memoryview, version: int = 3) -> None:
        self.size = len(data)
        self.data = data[:MAX_HEADER]
        self.end = len(self.data)
        self.position = 0
        self.length = struct.Struct("<I" if version == 1 else "<Q")  # of counts and sizes

    def step(self, num_bytes: int, what: str) -> int:
        """Where the next ``num_bytes`` begin; they are stepped over."""
        begin = self.position
        if num_bytes > self.end - begin:
            if self.end < self.size:
                raise Malformed(
                    f"byte {begin}: {what} goes beyond {MAX_HEADER} bytes: a header has at most "
                    "that many"
                )
            raise Malformed(
                f"byte {begin}: {what} needs {num_bytes} bytes, the file ends at {self.size}: "
                "truncated or corrupt"
            )
        self.position = begin + num_bytes
        return begin

    def number(self, form: struct.Struct, what: str) -> int:
        value: int = form.unpack_from(self.data, self.step(form.size, what))[0]
        return value

    def u32(self, what: str) -> int:
        return self.number(U32, what)

    def count(self, what: str) -> int:
        return self.number(self.length, what)

    def string(self, what: str, limit: int | None = None) -> str:
        """A length and that many bytes of UTF-8."""
        begin = self.position
        size = self.count(f"the length of {what}")
        if limit is not None and size > limit:
            raise Malformed(f"byte {begin}: {what} has {size} bytes: at most {limit}")
        start = self.step(size, what)
        try:
            return bytes(self.data[start : start + size]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(
                f"byte {start + error.start}: {what} is not UTF-8: {error.reason}"
            ) from None

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings; the hot loop of opening a file."""
        unpack, width = self.length.unpack_from, self.length.size
        data, position, last = self.data, self.position, self.end - self.length.size
        for _ in range(count):
            if position > last:
                break
            position += width + unpack(data, position)[0]
        if position > self.end or (position > last and position != self.end):
            self.position = min(position, self.end)
            raise Malformed(
                f"byte {self.position}: a string of {what} goes beyond the end, byte {self.end}: "
                "truncated or corrupt"
            )
        self.position = position
