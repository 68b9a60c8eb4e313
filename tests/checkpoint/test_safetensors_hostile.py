"""Whatever is wrong with a file, the reader says so in a CheckpointError and allocates nothing
for a lie.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.checkpoint import Checkpoint
from ktk.errors import CheckpointError
from make.checkpoints import raw_file, write_safetensors

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
}


def changed(name: str, **fields: Any) -> dict[str, Any]:
    header = json.loads(json.dumps(GOOD))
    header[name].update(fields)
    return header


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# id -> (header, what the message must name)
BAD_HEADERS: dict[str, tuple[object, str]] = {
    "not JSON": (b"{nope", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not JSON"),
    "a list": (b"[1, 2]", "begins with"),
    "an int": (b"17", "begins with"),
    "only spaces": (b"        ", "begins with"),
    "nested deeply": (b'{"a":' * 100_000, "nested too deeply"),
    "lists nested deeply": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "an int of many digits": (b'{"a": ' + b"9" * 100_000 + b"}", "not JSON"),
    "duplicate tensor": (b'{"a": 1, "a": 2}', "occurs twice"),
    "duplicate field": (
        b'{"a": {"dtype":"U8","shape":[29],"shape":[29],"data_offsets":[0,29]}}',
        "occurs twice",
    ),
    "metadata not strings": ({**GOOD, "__metadata__": {"a": 1}}, "__metadata__"),
    "metadata a list": ({**GOOD, "__metadata__": []}, "__metadata__"),
    "entry a list": ({**GOOD, "a": []}, "'a'"),
    "entry null": ({**GOOD, "a": None}, "'a'"),
    "entry with a field more": (changed("a", extra=1), "'a'"),
    "entry with a field less": ({**GOOD, "a": {"dtype": "F32", "shape": [2, 3]}}, "'a'"),
    "unknown dtype": (changed("a", dtype="F4"), "'F4'"),
    "dtype a number": (changed("a", dtype=4), "dtype 4"),
    "dtype a list": (changed("a", dtype=["F32"]), "dtype"),
    "negative dimension": (changed("a", shape=[-2, -3]), "'a'.*shape"),
    "float dimension": (changed("a", shape=[2.0, 3]), "'a'.*shape"),
    "bool dimension": (changed("b", shape=[5, True]), "'b'.*shape"),
    "NaN dimension": (changed("b", shape=[float("nan")]), "'b'.*shape"),
    "text dimension": (changed("a", shape=["2", 3]), "'a'.*shape"),
    "shape a number": (changed("b", shape=5), "'b'.*shape"),
    "huge dimension": (changed("a", shape=[2**64]), "'a'.*shape"),
    "product overflow": (changed("a", shape=[2**32, 2**32]), r"'a'.*2\*\*63"),
    "product overflow hidden by zero": (changed("a", shape=[0, 2**40, 2**40]), r"'a'.*2\*\*63"),
    "many dimensions": (changed("b", shape=[5] + [1] * 64), "'b'.*shape"),
    "offsets negative": (changed("a", data_offsets=[-24, 0]), "'a'.*data_offsets"),
    "offsets float": (changed("a", data_offsets=[0.0, 24.0]), "'a'.*data_offsets"),
    "offsets bool": (changed("a", data_offsets=[False, 24]), "'a'.*data_offsets"),
    "offsets three": (changed("a", data_offsets=[0, 24, 29]), "'a'.*data_offsets"),
    "offsets text": (changed("a", data_offsets="0,24"), "'a'.*data_offsets"),
    "begin behind end": (changed("a", data_offsets=[24, 0]), "'a'.*begin lies behind end"),
    "end behind file": (changed("b", shape=[6], data_offsets=[24, 30]), "'b'.*the file ends"),
    "end far behind file": (changed("b", shape=[2**40], data_offsets=[24, 24 + 2**40]), "'b'"),
    "size too small": (changed("a", shape=[2, 2]), "'a'.*needs 16"),
    "size too big": (changed("a", shape=[2, 4]), "'a'.*needs 32"),
    "itemsize wrong": (changed("a", dtype="F64"), "'a'.*needs 48"),
    "overlap": ({"a": entry("U8", [24], 0, 24), "b": entry("U8", [6], 23, 29)}, "'b'.*overlaps"),
    "same bytes twice": (
        {"a": entry("U8", [29], 0, 29), "b": entry("U8", [29], 0, 29)},
        "overlaps",
    ),
    "hole": ({"a": entry("U8", [23], 0, 23), "b": entry("U8", [5], 24, 29)}, "'b'.*hole"),
    "hole at the start": ({"a": entry("U8", [28], 1, 29)}, "'a'.*hole"),
    "bytes behind the last": ({"a": entry("F32", [2, 3], 0, 24)}, "bytes nothing names"),
    "no tensors but data": ({}, "bytes nothing names"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_a_checkpoint_error_that_names_the_file(tmp_path: Path, case: str) -> None:
    header, names = BAD_HEADERS[case]
    file = raw_file(tmp_path / "bad.safetensors", header, bytes(29))
    with pytest.raises(CheckpointError, match=f"(?s)bad.safetensors.*{names}") as caught:
        Checkpoint.open(file)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 1 << 20, 10**8, 10**8 + 1, 2**63, 2**64 - 1])
def test_lying_header_length_is_refused_without_allocating_it(tmp_path: Path, length: int) -> None:
    file = raw_file(tmp_path / "bad.safetensors", GOOD, bytes(29), length=length)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"bad.safetensors: header"):
            Checkpoint.open(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", range(0, 8))
def test_file_shorter_than_a_header_length_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "bad.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="header length"):
        Checkpoint.open(tmp_path / "bad.safetensors")


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    whole = raw_file(tmp_path / "good.safetensors", GOOD, bytes(29)).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            Checkpoint.open(cut)


def test_file_truncated_after_opening_is_an_error_not_a_signal(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", {"a": np.arange(5000, dtype=np.float32)})
    with Checkpoint.open(file) as checkpoint:
        os.truncate(file, 9000)
        with pytest.raises(CheckpointError, match=r"'a'.*truncated"):
            checkpoint.read("a")
        with pytest.raises(CheckpointError, match=r"'a'.*truncated"):
            list(checkpoint.chunks("a", 4096))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bytes_never_escape_as_another_exception(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("flip") / "f.safetensors"
    raw = bytearray(raw_file(file, GOOD, bytes(29)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        with Checkpoint.open(file) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    except CheckpointError:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(dtype=json_values | st.just("U8"), shape=json_values, offsets=json_values)
def test_any_json_in_an_entry_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, shape: Any, offsets: Any
) -> None:
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    file = raw_file(tmp_path_factory.mktemp("json") / "f.safetensors", header, bytes(4))
    try:
        with Checkpoint.open(file) as checkpoint:
            assert checkpoint.read("a").nbytes == 4
    except CheckpointError:
        pass


# what is read


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    from ktk.checkpoint.safetensors import DTYPES

    for dtype, kind in DTYPES.items():
        tensors[dtype] = (dtype, rng.integers(0, 256, (3, 4 * kind.itemsize), np.uint8).view(kind))
    tensors["scalar"] = ("F32", np.array(1.5, np.float32))
    tensors["empty"] = ("F32", np.empty((0, 7), np.float32))
    with Checkpoint.open(write_safetensors(tmp_path / "m.safetensors", tensors)) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, (_, array) in tensors.items():
            got = checkpoint.read(name)
            assert got.shape == array.shape
            assert got.dtype.itemsize == array.dtype.itemsize
            assert got.tobytes() == array.tobytes()
            assert b"".join(map(bytes, checkpoint.chunks(name, 7))) == array.tobytes()


def test_rows_reads_that_slice_of_dimension_0(tmp_path: Path) -> None:
    array = np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)
    with Checkpoint.open(write_safetensors(tmp_path / "m.safetensors", {"a": array})) as checkpoint:
        for start in range(5):
            for stop in range(start, 5):
                np.testing.assert_array_equal(
                    checkpoint.read("a", (start, stop)), array[start:stop]
                )
        for rows in ((-1, 2), (2, 1), (0, 5)):
            with pytest.raises(ValueError, match="rows"):
                checkpoint.read("a", rows)
        with pytest.raises(CheckpointError, match="no tensor 'b'"):
            checkpoint.read("b")


def test_official_library_reads_what_tests_write(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    got = load_file(write_safetensors(tmp_path / "m.safetensors", {"a": array}))
    np.testing.assert_array_equal(got["a"], array)


# directories


def two_shards(path: Path) -> tuple[dict[str, str], Callable[[Any], None]]:
    write_safetensors(path / "one.safetensors", {"a": np.zeros(4, np.float32)})
    write_safetensors(path / "two.safetensors", {"b": np.ones(4, np.float32)})

    def write(index: Any) -> None:
        (path / "model.safetensors.index.json").write_text(
            index if isinstance(index, str) else json.dumps(index)
        )

    placed = {"a": "one.safetensors", "b": "two.safetensors"}
    write({"metadata": {}, "weight_map": placed})
    return placed, write


def test_directory_with_an_index_without_one_and_a_single_file_open(tmp_path: Path) -> None:
    placed, _ = two_shards(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(placed)
        np.testing.assert_array_equal(checkpoint.read("b"), np.ones(4, np.float32))
    (tmp_path / "model.safetensors.index.json").unlink()
    with Checkpoint.open(str(tmp_path)) as checkpoint:
        assert set(checkpoint.tensors) == set(placed)
    with Checkpoint.open(tmp_path / "one.safetensors") as checkpoint:
        assert set(checkpoint.tensors) == {"a"}
    write_safetensors(tmp_path / "model.safetensors", {"c": np.zeros(1, np.float32)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"c"}


@pytest.mark.parametrize(
    ("index", "names"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"a": 1}}, "weight_map"),
        ({"weight_map": {"a": "../one.safetensors"}}, "inside the directory"),
        ({"weight_map": {"a": "x/../../one.safetensors"}}, "inside the directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, "inside the directory"),
        ({"weight_map": {"a": "one\0.safetensors"}}, "inside the directory"),
        ({"weight_map": {"a": ""}}, "inside the directory"),
        ({"weight_map": {"a": "three.safetensors"}}, r"three.safetensors: missing"),
        (
            {"weight_map": {"a": "two.safetensors", "b": "two.safetensors"}},
            "two.safetensors: lacks tensor 'a'",
        ),
        (
            {"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}},
            "one.safetensors: lacks tensor 'c'",
        ),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "occurs twice"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: Any, names: str) -> None:
    _, write = two_shards(tmp_path)
    write(index)
    with pytest.raises(CheckpointError, match=names):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"a": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"'a' is in both .*one.* and .*two"):
        Checkpoint.open(tmp_path)


def test_missing_places_and_wrong_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"must be a directory or a \.safetensors file"):
        Checkpoint.open(tmp_path / "model.gguf")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


def test_symlinks_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"  # as the hub's cache lies
    blobs.mkdir()
    snapshot.mkdir()
    write_safetensors(blobs / "0123", {"a": np.zeros(4, np.float32)})
    (snapshot / "model.safetensors").symlink_to("../blobs/0123")
    with Checkpoint.open(snapshot) as checkpoint:
        assert checkpoint.read("a").shape == (4,)
    (blobs / "0123").unlink()
    with pytest.raises(
        CheckpointError, match=r"symbolic link to \.\./blobs/0123, which does not exist"
    ):
        Checkpoint.open(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize(
    ("text", "names"),
    [(None, "missing"), ("", "not JSON"), ("[]", "object"), ("{", "not JSON"), ('"x"', "object")],
)
def test_bad_config_is_refused_when_asked_for(tmp_path: Path, text: str | None, names: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(4, np.float32)})
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=f"config.json.*{names}"),
    ):
        _ = checkpoint.config


def test_closing_gives_the_descriptors_back(tmp_path: Path) -> None:
    two_shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Checkpoint.open(tmp_path).close()
    (tmp_path / "two.safetensors").write_bytes(b"bad")
    for _ in range(3):
        with pytest.raises(CheckpointError):
            Checkpoint.open(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
