"""Reading experts from a disk: right bytes or a clear error, whatever the reads do."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ktk.checkpoint.packed import layer_path, write_layer
from ktk.errors import CheckpointError
from ktk.experts.spec import MoESpec
from ktk.machine.memory import aligned_buffer
from ktk.placement.residency.reader import BLOCK, TRIES, PackedReader, fill
from make.cases import assert_exact, pack_all, random_experts

SPEC = MoESpec(4, 96, 160, "int4", has_bias=True)
SIZE = SPEC.layout.expert_bytes


@pytest.fixture(scope="module")
def spans() -> list[np.ndarray]:
    """Of two layers."""
    return [np.asarray(pack_all(SPEC, random_experts(SPEC, seed)).spans) for seed in (1, 2)]


@pytest.fixture
def directory(tmp_path: Path, spans: list[np.ndarray]) -> Path:
    for layer, rows in zip((3, 5), spans, strict=True):
        write_layer(tmp_path, SPEC, layer, rows)
    return tmp_path


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_every_expert_is_read_as_it_was_written(
    directory: Path, spans: list[np.ndarray], direct: bool
) -> None:
    reader = PackedReader(directory, (3, 5), direct=direct)
    if direct and not reader.is_direct:
        pytest.skip("this file system takes no O_DIRECT")
    span = aligned_buffer(SIZE)
    for layer, rows in enumerate(spans):
        for expert in (2, 0, 3, 1):
            reader.read(layer, expert, span)
            assert_exact(rows[expert], span)
    assert reader.specs == [SPEC, SPEC]
    reader.close()


def test_a_file_replaced_meanwhile_does_not_matter(
    directory: Path, spans: list[np.ndarray]
) -> None:
    reader = PackedReader(directory, (3, 5))
    write_layer(directory, SPEC, 3, spans[1])
    span = aligned_buffer(SIZE)
    reader.read(0, 1, span)
    assert_exact(spans[0][1], span)
    reader.close()


def test_no_descriptor_is_left_open(directory: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    PackedReader(directory, (3, 5)).close()
    with pytest.raises(CheckpointError):
        PackedReader(directory, (3, 4))
    reader = PackedReader(directory, (3,))
    del reader
    assert count() == before


def faulty(rng: random.Random, often: float) -> Callable[[int, list[memoryview], int], int]:
    """preadv that stops short, or fails in a way that may go by."""

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        chance = rng.random()
        if chance < often / 2:
            raise OSError(rng.choice([errno.EIO, errno.EAGAIN]), "made to fail")
        if chance < often:
            return os.preadv(fd, [views[0][: rng.randrange(1, len(views[0]) + 1)]], offset)
        return os.preadv(fd, views, offset)

    return preadv


def test_thousands_of_faulty_reads_give_right_bytes_or_an_error(
    directory: Path, spans: list[np.ndarray]
) -> None:
    rng = random.Random(11)
    reader = PackedReader(directory, (3, 5), direct=False, preadv=faulty(rng, 0.6))
    span, right, refused = aligned_buffer(SIZE), 0, 0
    for _ in range(4000):
        layer, expert = rng.randrange(2), rng.randrange(4)
        try:
            reader.read(layer, expert, span)
        except CheckpointError:
            refused += 1
        else:
            assert_exact(spans[layer][expert], span)
            right += 1
    reader.close()
    assert right > 2000
    assert refused > 5


def test_a_short_read_goes_on_at_a_whole_block(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, 5 * BLOCK).astype(np.uint8)
    path = tmp_path / "x"
    path.write_bytes(raw.tobytes())
    offsets: list[int] = []

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return os.preadv(fd, [views[0][: BLOCK + 100]], offset)

    span = aligned_buffer(4 * BLOCK)
    fd = os.open(path, os.O_RDONLY)
    fill(fd, span, BLOCK, "x", preadv)
    os.close(fd)
    assert_exact(raw[BLOCK:], span)
    assert offsets == [BLOCK * i for i in (1, 2, 3, 4)]


def test_errors_that_stay_are_told_with_the_bytes(directory: Path) -> None:
    calls = [0]

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        calls[0] += 1
        raise OSError(errno.EIO, "Input/output error")

    reader = PackedReader(directory, (3,), preadv=preadv)
    begin = layer_path(directory, 3).stat().st_size - 3 * SIZE
    with pytest.raises(
        CheckpointError,
        match=rf"expert 1: reading bytes {begin} to {begin + SIZE}: .*tried {TRIES} times",
    ):
        reader.read(0, 1, aligned_buffer(SIZE))
    assert calls == [TRIES]
    reader.close()


def test_other_errors_are_told_at_once(directory: Path) -> None:
    calls = [0]

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        calls[0] += 1
        raise OSError(errno.EBADF, "Bad file descriptor")

    reader = PackedReader(directory, (3,), preadv=preadv)
    with pytest.raises(CheckpointError, match="Bad file descriptor"):
        reader.read(0, 1, aligned_buffer(SIZE))
    assert calls == [1]
    reader.close()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_a_file_truncated_meanwhile_is_told(directory: Path, direct: bool) -> None:
    reader = PackedReader(directory, (3,), direct=direct)
    path = layer_path(directory, 3)
    os.truncate(path, path.stat().st_size - SIZE - 100)
    span = aligned_buffer(SIZE)
    reader.read(0, 1, span)
    for expert in (2, 3):
        with pytest.raises(CheckpointError, match=f"expert {expert}: .*truncated"):
            reader.read(0, expert, span)
    reader.close()


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path, spans: list[np.ndarray]) -> None:
    bad = spans[0].copy()
    bias = SPEC.layout.bias(bad, "down")
    assert bias is not None
    bias.view(np.float32)[2, 7] = np.nan
    write_layer(tmp_path, SPEC, 0, bad)
    reader = PackedReader(tmp_path, (0,))
    span = aligned_buffer(SIZE)
    reader.read(0, 1, span)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="layer 0 expert 2: down bias: .* NaN"):
            reader.read(0, 2, span)
    reader.close()
