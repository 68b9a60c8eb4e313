"""GGUF files are read as the gguf package reads them: names, shapes, bytes, values; whole,
split and in directories.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.gguf import header as reader
from ktk.errors import CheckpointError
from make.gguf_files import (
    ARRAY,
    BOOL,
    STRING,
    U8,
    U32,
    key,
    random_blocks,
    raw_file,
    tensor,
    write_gguf,
)

DEQUANTISED = [kind for kind in Type if kind in quants._type_traits or kind in (Type.F32, Type.F16)]


def some_tensors(seed: int = 1) -> dict[str, tuple[np.ndarray, Type]]:
    rng = np.random.default_rng(seed)
    return {f"t.{kind.name}": random_blocks(rng, kind, 2, 3, 512) for kind in Type}


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def test_tensors_have_the_names_shapes_and_bytes_that_the_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama", some_tensors())
    checkpoint, theirs = GgufCheckpoint.open(path), gguf.GGUFReader(path)
    assert list(checkpoint.tensors) == [t.name for t in theirs.tensors]
    for want in theirs.tensors:
        got = checkpoint.tensors[want.name]
        assert got.type == want.tensor_type.name and got.file == path
        assert got.shape == tuple(want.shape[::-1].tolist()) == (2, 3, 512)
        assert (got.begin, got.num_bytes) == (want.data_offset, want.n_bytes)
        blocks = checkpoint.blocks(want.name)
        assert blocks.shape == (2, 3, got.row_bytes) and blocks.dtype == np.uint8
        assert blocks.tobytes() == want.data.tobytes()


@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda kind: kind.name)
def test_read_is_the_packages_dequantisation_bit_for_bit(tmp_path: Path, kind: Type) -> None:
    blocks, _ = random_blocks(np.random.default_rng(7), kind, 5, 512)
    path = write_gguf(tmp_path / "a.gguf", "llama", {"t": (blocks, kind)})
    checkpoint = GgufCheckpoint.open(path)
    with np.errstate(all="ignore"):
        want = quants.dequantize(blocks, kind)
    got = checkpoint.read("t")
    assert got.dtype == np.float32 and got.shape == (5, 512) and got.flags.writeable
    np.testing.assert_array_equal(bits(got), bits(want))
    np.testing.assert_array_equal(bits(checkpoint.read("t", (1, 3))), bits(want[1:3]))
    assert checkpoint.read("t", (2, 2)).shape == (0, 512)
    with pytest.raises(ValueError, match="rows 3 to 6 of t"):
        checkpoint.read("t", (3, 6))


def test_types_that_cannot_be_dequantised_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama", some_tensors())
    checkpoint = GgufCheckpoint.open(path)
    for kind in set(Type) - set(DEQUANTISED):
        with pytest.raises(CheckpointError, match=f"'t.{kind.name}': .* decodes {kind.name}"):
            checkpoint.read(f"t.{kind.name}")


def test_blocks_are_read_only_views_that_outlive_the_checkpoint(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama", some_tensors())
    checkpoint = GgufCheckpoint.open(path)
    blocks = checkpoint.blocks("t.Q4_K")
    assert not blocks.flags.writeable and np.shares_memory(blocks, checkpoint.file_bytes(path))
    copy = blocks.copy()
    del checkpoint
    path.unlink()
    gc.collect()
    np.testing.assert_array_equal(blocks, copy)


def test_metadata_has_every_kind_of_value(tmp_path: Path) -> None:
    given = {"a.s": "text", "a.i": 7, "a.f": 0.5, "a.b": True, "a.l": [1, 2, 3], "a.t": ["x", "é"]}
    path = write_gguf(tmp_path / "a.gguf", "llama", {"t": np.ones(4, np.float32)}, given)
    metadata = GgufCheckpoint.open(path).metadata
    assert {name: metadata[name] for name in given} == given
    assert metadata["general.architecture"] == "llama" and "nothing" not in metadata
    assert metadata.size("a.t") == 2 and metadata.size("a.s") is None
    assert set(metadata) >= set(given) and len(metadata) == len(set(metadata))


def test_arrays_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [f"token {i}" for i in range(1000)]
    path = write_gguf(
        tmp_path / "a.gguf", "llama", {"t": np.ones(4, np.float32)}, {"tokens": tokens}
    )
    asked: list[str] = []
    elements = reader.Header._elements
    monkeypatch.setattr(
        reader.Header,
        "_elements",
        lambda self, cursor, array, where: (
            asked.append(where) or elements(self, cursor, array, where)
        ),
    )
    metadata = GgufCheckpoint.open(path).metadata
    assert metadata.size("tokens") == 1000 and not asked
    assert metadata["tokens"] == tokens == metadata["tokens"]
    assert len(asked) == 1


def test_arrays_in_arrays_are_read(tmp_path: Path) -> None:
    nested = (ARRAY, [(U8, [1, 2]), (STRING, ["a", "b"]), (ARRAY, [(BOOL, [1])])])
    path = raw_file(tmp_path / "a.gguf", [key("n", ARRAY, nested), key("z", U32, 5)], [])
    metadata = GgufCheckpoint.open(path).metadata
    assert metadata["n"] == [[1, 2], ["a", "b"], [[True]]] and metadata["z"] == 5


@pytest.mark.parametrize("version", [1, 2, 3])
def test_versions_one_to_three_are_read(tmp_path: Path, version: int) -> None:
    keys = [
        key("general.architecture", STRING, "llama", version),
        key("words", ARRAY, (STRING, ["a", "bc"]), version),
    ]
    infos = [
        tensor("one", [4, 2], 0, 0, version),
        tensor("two", [32], Type.Q8_0, 32, version),
    ]
    data = np.arange(8, dtype="<f4").tobytes() + bytes(range(34))
    path = raw_file(tmp_path / "a.gguf", keys, infos, data, version=version)
    checkpoint = GgufCheckpoint.open(path)
    np.testing.assert_array_equal(checkpoint.read("one"), np.arange(8).reshape(2, 4))
    assert checkpoint.blocks("two").tobytes() == bytes(range(34))
    assert checkpoint.metadata["words"] == ["a", "bc"]


@pytest.mark.parametrize("alignment", [1, 8, 256, 4096])
def test_alignment_is_honoured(tmp_path: Path, alignment: int) -> None:
    keys = [key("general.alignment", U32, alignment)]
    infos = [tensor("one", [4]), tensor("two", [4], 0, -(-16 // alignment) * alignment)]
    data = bytes(range(16)).ljust(max(16, alignment), b"\0") + bytes(range(16))
    path = raw_file(tmp_path / "a.gguf", keys, infos, data, alignment=alignment)
    checkpoint = GgufCheckpoint.open(path)
    for name in ("one", "two"):
        assert checkpoint.tensors[name].begin % alignment == 0
        assert checkpoint.blocks(name).tobytes() == bytes(range(16))


@pytest.mark.parametrize(
    ("number", "text"), [(31, "Q4_0_4_4: llama.cpp removed"), (4, "re-quantise"), (77, "type 77")]
)
def test_a_tensor_of_an_unknown_type_is_refused_when_used(
    tmp_path: Path, number: int, text: str
) -> None:
    infos = [tensor("good", [4]), tensor("bad", [32], number, 32)]
    path = raw_file(tmp_path / "a.gguf", [], infos, bytes(64))
    checkpoint = GgufCheckpoint.open(path)
    np.testing.assert_array_equal(checkpoint.read("good"), np.zeros(4))
    for use in (checkpoint.blocks, checkpoint.read, checkpoint.will_need):
        with pytest.raises(CheckpointError, match=f"tensor 'bad'.*{text}"):
            use("bad")


# Split models and directories


def write_split(directory: Path, name: str = "m", seed: int = 1) -> list[Path]:
    directory.mkdir(exist_ok=True)
    write_gguf(
        directory / f"{name}.gguf", "llama", some_tensors(seed), {"a.b": 3}, split_max_tensors=12
    )
    return sorted(directory.glob(f"{name}-*.gguf"))


def test_any_part_and_the_directory_open_the_whole_model(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "d")
    whole = GgufCheckpoint.open(write_gguf(tmp_path / "whole.gguf", "llama", some_tensors()))
    assert len(parts) == 3
    for path in [*parts, tmp_path / "d"]:
        checkpoint = GgufCheckpoint.open(path)
        assert checkpoint.path == path and list(checkpoint.files) == parts
        assert checkpoint.metadata["a.b"] == 3
        assert not [name for name in checkpoint.metadata if name.startswith("split.")]
        assert set(checkpoint.tensors) == set(whole.tensors)
        for name in whole.tensors:
            np.testing.assert_array_equal(checkpoint.blocks(name), whole.blocks(name))


def test_renamed_parts_in_a_directory_are_put_in_order(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "d")
    for new, part in zip("cab", parts, strict=True):
        part.rename(part.with_name(f"{new}.gguf"))
    checkpoint = GgufCheckpoint.open(tmp_path / "d")
    assert [file.name for file in checkpoint.files] == ["c.gguf", "a.gguf", "b.gguf"]
    with pytest.raises(CheckpointError, match="one of 3 parts.*give its directory"):
        GgufCheckpoint.open(tmp_path / "d" / "a.gguf")


def test_missing_parts_are_named(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "d")
    parts[1].unlink()
    for path in (parts[0], tmp_path / "d"):
        with pytest.raises(
            CheckpointError, match="1 of 3 parts are missing: m-00002-of-00003.gguf"
        ):
            GgufCheckpoint.open(path)
    parts[0].unlink()
    with pytest.raises(CheckpointError, match="m-00001-of-00003.gguf, m-00002-of-00003.gguf"):
        GgufCheckpoint.open(tmp_path / "d")


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    parts, others = write_split(tmp_path / "d"), write_split(tmp_path / "e", seed=2)
    os.replace(others[0], parts[1])
    with pytest.raises(CheckpointError, match="both part 1 of 3"):
        GgufCheckpoint.open(parts[0])
    with pytest.raises(CheckpointError, match="both part 1 of 3|are missing"):
        GgufCheckpoint.open(tmp_path / "d")
    parts = write_split(tmp_path / "f")
    write_gguf(
        tmp_path / "g.gguf",
        "llama",
        {"t": np.ones(4, np.float32)},
        {"split.no": 1, "split.count": 3},
    )
    os.replace(tmp_path / "g.gguf", parts[1])
    with pytest.raises(CheckpointError, match="split.tensors.count is"):
        GgufCheckpoint.open(parts[0])


def test_several_models_in_a_directory_are_named(tmp_path: Path) -> None:
    write_split(tmp_path / "d", "first")
    write_gguf(tmp_path / "d" / "second.gguf", "llama", some_tensors())
    with pytest.raises(CheckpointError, match=r"2 models \(first, second.gguf\)"):
        GgufCheckpoint.open(tmp_path / "d")


def test_a_vision_projector_beside_the_model_is_left_out(tmp_path: Path) -> None:
    write_gguf(tmp_path / "mmproj-F16.gguf", "clip", {"v": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match="v"):
        GgufCheckpoint.open(tmp_path).info("nothing like v")
    write_gguf(tmp_path / "model.gguf", "llama", {"t": np.ones(4, np.float32)})
    write_gguf(
        tmp_path / "lora.gguf", "llama", {"l": np.ones(4, np.float32)}, {"general.type": "adapter"}
    )
    (tmp_path / "sub").mkdir()
    assert set(GgufCheckpoint.open(tmp_path).tensors) == {"t"}


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    for part in (0, 1):
        keys = [key("split.no", U32, part), key("split.count", U32, 2)]
        path = raw_file(
            tmp_path / f"m-0000{part + 1}-of-00002.gguf", keys, [tensor("t", [4])], bytes(16)
        )
    with pytest.raises(CheckpointError, match="tensor 't' is in both .*00001.*and.*00002"):
        GgufCheckpoint.open(path)


# Readahead


def test_readahead_takes_any_range_and_read_pages_are_resident(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama", {"t": np.ones((512, 1024), np.float32)})
    checkpoint = GgufCheckpoint.open(path)
    checkpoint.read("t")
    assert checkpoint.is_resident("t")
    checkpoint.will_need("t")
    file = checkpoint._mapped[path]
    for begin, num_bytes in ((0, 0), (1, 1), (-5, 10), (file.size - 1, 1 << 70), (1 << 70, 5)):
        file.will_need(begin, num_bytes)
        assert file.is_resident(begin, num_bytes)


def test_readahead_brings_dropped_pages_back(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama", {"t": np.ones((4096, 1024), np.float32)})
    checkpoint = GgufCheckpoint.open(path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())  # dirty pages are not dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if checkpoint.is_resident("t"):
        pytest.skip("the file system keeps its pages, or mincore does not tell")
    checkpoint.will_need("t")
    deadline = time.monotonic() + 10
    while not checkpoint.is_resident("t") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert checkpoint.is_resident("t")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps")
def test_reading_blocks_takes_no_memory_of_the_process_own(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "big.gguf", "llama", {"t": np.ones((4096, 2048), np.float32)})
    blocks = GgufCheckpoint.open(path).blocks("t")
    assert blocks.max() == 128
    parts = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    assert parts
    for part in parts:
        fields = dict(line.split(":", 1) for line in part.splitlines()[1:20] if ":" in line)
        assert int(fields["Rss"].split()[0]) > 30_000  # kB
        assert int(fields["Anonymous"].split()[0]) == 0  # all of it is the page cache's
