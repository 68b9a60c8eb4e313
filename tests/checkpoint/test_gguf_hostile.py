"""Whatever is wrong with a GGUF file, a CheckpointError says what and where,
and nothing is allocated for a lie.
"""

from __future__ import annotations

import errno
import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ktk.checkpoint.gguf import GgufCheckpoint, cursor
from ktk.checkpoint.gguf import header as reader
from ktk.errors import CheckpointError
from ktk.models.find import find_gguf_experts
from make import fuzz_gguf
from make.gguf_files import (
    ARRAY,
    BOOL,
    STRING,
    U8,
    U32,
    key,
    raw_file,
    sizes,
    stacked,
    string,
    tensor,
    write_gguf,
)

BIG = 1 << 60
COUNT = struct.Struct("<IQ")  # an array's type and length


def array_of(name: str, kind: int, count: int) -> bytes:
    """The head of an array that is not there."""
    return string(name) + struct.pack("<I", ARRAY) + COUNT.pack(kind, count)


# id -> (keys, tensor infos, bytes of data, what the message must name)
BAD_FILES: dict[str, tuple[list[bytes], list[bytes], int, str]] = {
    "a key twice": ([key("a", U32, 1), key("a", U32, 1)], [], 0, "key 'a' occurs twice"),
    "a tensor twice": ([], [tensor("t", [4]), tensor("t", [4])], 16, "tensor 't' occurs twice"),
    "a key not UTF-8": ([key(b"a\xff", U32, 1)], [], 0, "byte 33: a key is not UTF-8"),
    "a tensor's name not UTF-8": ([], [tensor(b"\xfft", [4])], 16, "byte 32.*name is not UTF-8"),
    "a value not UTF-8": ([key("a", STRING, b"\xff")], [], 0, "key 'a' is not UTF-8"),
    "an unknown value type": (
        [key("a", U32, 0)[:-8] + struct.pack("<II", 13, 0)],
        [],
        0,
        "value type 13",
    ),
    "an unknown element type": ([array_of("a", 13, 0)], [], 0, "element type 13"),
    "a bool of 2": ([key("a", BOOL, 2)], [], 0, "'a' is 2: a bool is 0 or 1"),
    "2^60 strings": ([array_of("a", STRING, BIG)], [], 64, f"'a' has {BIG} elements"),
    "2^60 bytes": ([array_of("a", U8, BIG)], [], 64, f"'a' has {BIG} elements"),
    "2^64-1 doubles": ([array_of("a", 12, 2**64 - 1)], [], 64, f"'a' has {2**64 - 1} elements"),
    "2^60 arrays": ([array_of("a", ARRAY, BIG)], [], 64, f"'a' has {BIG} elements"),
    "arrays nested deeply": (
        [array_of("a", ARRAY, 1) + COUNT.pack(ARRAY, 1) * 10_000],
        [],
        0,
        "more than 4 deep",
    ),
    "a million arrays in an array": (
        [array_of("a", ARRAY, 1 << 20) + COUNT.pack(U8, 0) * (1 << 20)],
        [],
        0,
        "more than 65536 arrays",
    ),
    "a string of 2^60 bytes": (
        [string("a") + struct.pack("<IQ", STRING, BIG)],
        [],
        64,
        "'a' needs",
    ),
    "a string of 2^64-1 bytes in an array": (
        [array_of("a", STRING, 1) + struct.pack("<Q", 2**64 - 1)],
        [],
        64,
        "a string of key 'a'",
    ),
    "a key of 2^60 bytes": ([struct.pack("<Q", BIG)], [], 64, f"a key has {BIG} bytes: at most"),
    "no dimension": ([], [tensor("t", [])], 16, "'t' has 0 dimensions: must be 1 to 4"),
    "5 dimensions": ([], [tensor("t", [1] * 5)], 16, "'t' has 5 dimensions"),
    "a dimension of 0": ([], [tensor("t", [4, 0])], 16, r"'t' has shape \(0, 4\)"),
    "2^63 elements": ([], [tensor("t", [1 << 32, 1 << 31])], 16, "1 to 2"),
    "2^256 elements": ([], [tensor("t", [2**64 - 1] * 4)], 16, "1 to 2"),
    "2^62 elements": ([], [tensor("t", [1 << 31, 1 << 31])], 16, "the file ends at"),
    "a row of half a block": ([], [tensor("t", [48], 8)], 99, "Q8_0 has blocks of 32"),
    "data beyond the end": ([], [tensor("t", [5])], 16, "'t': bytes 64 to 84, the file ends at 80"),
    "an offset beyond the end": ([], [tensor("t", [4], 0, 32)], 16, "the file ends at"),
    "an offset of 2^64-32": ([], [tensor("t", [4], 0, 2**64 - 32)], 16, "the file ends at"),
    "an unknown type beyond the end": ([], [tensor("t", [4], 77, 32)], 16, "the file ends at"),
    "a misaligned offset": ([], [tensor("t", [4], 0, 8)], 64, "offset 8 is not a multiple"),
    "overlapping tensors": (
        [],
        [tensor("t", [16]), tensor("u", [4], 0, 32)],
        64,
        "'u'.* overlap tensor 't'",
    ),
    "the same bytes twice": ([], [tensor("t", [4]), tensor("u", [4])], 64, "overlap"),
    "alignment 0": ([key("general.alignment", U32, 0)], [], 0, "alignment is 0: must be a power"),
    "alignment 24": ([key("general.alignment", U32, 24)], [], 0, "alignment is 24"),
    "alignment 2^31": ([key("general.alignment", U32, 1 << 31)], [], 0, "alignment is 2147483648"),
    "alignment a string": ([key("general.alignment", STRING, "32")], [], 0, "value type 8"),
    "part 3 of 2": ([key("split.no", U32, 3), key("split.count", U32, 2)], [], 0, "split.no 3"),
    "a part of 2^32-1": (
        [key("split.no", U32, 3), key("split.count", U32, 2**32 - 1)],
        [],
        0,
        "split.count",
    ),
    "a part of text": (
        [key("split.count", STRING, "2")],
        [],
        0,
        "split.no None of split.count '2'",
    ),
    "a part of a list": ([key("split.count", ARRAY, (U32, [2]))], [], 0, "split.count"),
}


def measured(path: Path) -> tuple[str, int]:
    """The message that opening ``path`` ends with, and the most memory it took."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            find_gguf_experts(GgufCheckpoint.open(path))
        return str(error.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_what_and_where(tmp_path: Path, case: str) -> None:
    keys, tensors, num_bytes, text = BAD_FILES[case]
    path = raw_file(tmp_path / "bad.gguf", keys, tensors, bytes(num_bytes))
    begin = time.perf_counter()
    message, memory = measured(path)
    assert time.perf_counter() - begin < 2
    assert memory < 1 << 20
    assert str(path) in message and len(message) < 1000
    with pytest.raises(CheckpointError, match=text):
        GgufCheckpoint.open(path)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((BIG, 0), f"number of tensors is {BIG}: at most"),
        ((2**64 - 1, 0), "number of tensors"),
        ((0, BIG), f"number of keys is {BIG}: at most"),
        ((reader.MAX_TENSORS, 0), "byte 8: number of tensors is 262144.*the file ends at 32"),
        ((0, reader.MAX_KEYS), "byte 16: number of keys is 65536.*the file ends at 32"),
    ],
)
def test_counts_that_the_file_cannot_hold_are_refused(
    tmp_path: Path, counts: tuple[int, int], text: str
) -> None:
    path = raw_file(tmp_path / "bad.gguf", [], [], counts=counts)
    _, memory = measured(path)
    assert memory < 1 << 20
    with pytest.raises(CheckpointError, match=text):
        GgufCheckpoint.open(path)


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (b"", "has 0 bytes: not GGUF"),
        (b"GGUF", "has 4 bytes"),
        (b"GGUF\3\0\0\0", "byte 8: the number of tensors"),
        (b"GGUF\0\0\0\3" + bytes(16), "big-endian.*gguf-convert-endian"),
        (b"GGUF\0\0\0\0" + bytes(16), "version 0: ktk reads 1, 2 and 3"),
        (b"GGUF\4\0\0\0" + bytes(16), "version 4"),
        (b"lmgg" + bytes(16), "from before GGUF"),
        (b"tjgg" + bytes(16), "from before GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\3\4" + bytes(16), "PyTorch"),
        (b"<html>" + bytes(16), "is this a GGUF file"),
    ],
)
def test_what_is_not_gguf_is_named(tmp_path: Path, start: bytes, text: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=text):
        GgufCheckpoint.open(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    tensors = stacked(np.random.default_rng(1), (0,))
    path = write_gguf(
        tmp_path / "a.gguf", "qwen3moe", tensors, {**sizes("qwen3moe"), "words": ["a", "bc"]}
    )
    whole = path.read_bytes()
    checkpoint = GgufCheckpoint.open(path)
    data = min(t.begin for t in checkpoint.tensors.values())
    last = max(t.begin + t.num_bytes for t in checkpoint.tensors.values())
    for size in [*range(data + 1), *range(data, last, 997), last - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{path.name}: .*(byte|tensor)"):
            GgufCheckpoint.open(path)


def test_a_header_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "MAX_HEADER", 1000)
    path = raw_file(tmp_path / "a.gguf", [key("a", STRING, "x" * 2000)], [])
    with pytest.raises(CheckpointError, match="goes beyond 1000 bytes"):
        GgufCheckpoint.open(path)
    path = raw_file(tmp_path / "a.gguf", [key("a", ARRAY, (STRING, ["x" * 90] * 50))], [])
    with pytest.raises(CheckpointError, match="beyond the end, byte 1000"):
        GgufCheckpoint.open(path)


def test_ten_million_empty_strings_open_in_seconds(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.gguf", [array_of("a", STRING, 10_000_000)], [], bytes(80_000_000))
    begin = time.perf_counter()
    checkpoint = GgufCheckpoint.open(path)
    assert time.perf_counter() - begin < 10  # 1 s on the build machine
    assert checkpoint.metadata.size("a") == 10_000_000


def test_a_list_for_the_architecture_is_not_read(tmp_path: Path) -> None:
    path = raw_file(
        tmp_path / "a.gguf", [key("general.architecture", ARRAY, (U8, [0] * 10_000_000))], []
    )
    message, memory = measured(path)
    assert "must be a name" in message and memory < 1 << 20


def test_an_array_not_utf8_is_refused_when_asked_for(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.gguf", [key("a", ARRAY, (STRING, [b"x", b"\xff"]))], [])
    metadata = GgufCheckpoint.open(path).metadata
    with pytest.raises(CheckpointError, match="a string of key 'a' is not UTF-8"):
        _ = metadata["a"]


# Paths


def test_paths_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken.gguf").symlink_to(tmp_path / "gone.gguf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir" / "a.gguf").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.gguf")
    cases = {
        "nothing": "no such file or directory",
        "loop": "loop",
        "broken.gguf": "symbolic link to .*gone.gguf, which does not exist",
        "empty": "holds no .gguf file",
        "dir": "not a regular file",
        "pipe.gguf": "not a regular file",
        "nul\0byte": "nul|null",
    }
    for name, text in cases.items():
        with pytest.raises(CheckpointError, match=text):
            GgufCheckpoint.open(tmp_path / name)


def test_a_directory_that_links_to_itself_is_not_followed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", {"t": np.ones(4, np.float32)})
    (tmp_path / "again").symlink_to(tmp_path)
    assert set(GgufCheckpoint.open(tmp_path).tensors) == {"t"}
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    with pytest.raises(CheckpointError, match="loop.gguf"):
        GgufCheckpoint.open(tmp_path)


def test_files_without_permission_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", {"t": np.ones(4, np.float32)})

    def refused(*_: object) -> int:  # root may read whatever the mode
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    for given in (path, tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: cannot be opened: Permission denied"):
            GgufCheckpoint.open(given)
    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be listed: Permission denied"):
        GgufCheckpoint.open(tmp_path)


# Mutations


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    counts = fuzz_gguf.run(tmp_path, inputs=1500, seed=2, limit_memory=False)
    assert counts["read"] > 50 and counts["refused"] > 300


def test_the_fuzzer_tells_what_must_not_come_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(fuzz_gguf, "use", broken)
    with pytest.raises(fuzz_gguf.Escaped, match="KeyError"):
        fuzz_gguf.run(tmp_path, inputs=1, seed=1, limit_memory=False)
