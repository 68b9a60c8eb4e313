"""llama.cpp's importance matrices: both kinds of files, by hand and by ktk; hostile ones."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from ktk.checkpoint.imatrix import Imatrix, Importance, read_imatrix, write_imatrix
from ktk.errors import CheckpointError

F = np.float32


def dat(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += np.array(values, "<f4").tobytes()
    return out + tail


def test_a_dat_file_of_llama_cpp_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 7, 8) + b"wiki.raw"
    path.write_bytes(dat({"blk.0.ffn_down_exps.weight": (4, [8, 4, 0, 12])}, tail))
    found = read_imatrix(path)
    assert found.dataset == "wiki.raw"
    entry = found.entries["blk.0.ffn_down_exps.weight"]
    assert entry.mean_squares.tolist() == [[2, 1, 0, 3]]
    assert entry.by_matrix(2).mean_squares.tolist() == [[2, 1], [0, 3]]
    with pytest.raises(ValueError, match="1 x 4 numbers: must be of 3 matrices"):
        entry.by_matrix(3)
    path.write_bytes(dat({"a": (1, [1.0])}))  # of before a dataset was named
    assert read_imatrix(path).entries["a"].mean_squares.tolist() == [[1]]


def some() -> Imatrix:
    rng = np.random.default_rng(0)
    squares = np.square(rng.standard_normal((3, 5))).astype(F)
    squares[1] = 0
    counts = np.array([700, 0, 9], F)
    whole = Importance(np.square(rng.standard_normal((1, 8))).astype(F), np.array([1024], F))
    names = ("blk.1.ffn_up_exps.weight", "blk.0.attn_q.weight")
    entries = dict(zip(names, (Importance(squares, counts), whole), strict=True))
    return Imatrix(entries, 512, "text.txt")


def test_gguf_files_have_sums_and_counts_as_llama_cpp_has_them(tmp_path: Path) -> None:
    path, wanted = tmp_path / "imatrix.gguf", some()
    write_imatrix(path, wanted)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert "general.architecture" not in fields
    assert (fields["general.type"], fields["imatrix.chunk_count"]) == ("imatrix", 2)
    assert (fields["imatrix.datasets"], fields["imatrix.chunk_size"]) == (["text.txt"], 512)
    tensors = {t.name: t for t in reader.tensors}
    entry = wanted.entries["blk.1.ffn_up_exps.weight"]
    sums, counts = (tensors[f"blk.1.ffn_up_exps.weight.{n}"] for n in ("in_sum2", "counts"))
    assert (sums.shape.tolist(), counts.shape.tolist()) == ([5, 3], [1, 3])
    np.testing.assert_allclose(sums.data, entry.mean_squares * entry.counts[:, None], rtol=1e-6)
    got = read_imatrix(path)
    assert (got.dataset, got.chunk_size) == ("text.txt", 512)
    for name, entry in wanted.entries.items():
        np.testing.assert_allclose(got.entries[name].mean_squares, entry.mean_squares, rtol=1e-6)
        np.testing.assert_array_equal(got.entries[name].counts, entry.counts)


def test_dat_files_say_the_same_but_of_experts_without_tokens(tmp_path: Path) -> None:
    path, wanted = tmp_path / "imatrix.dat", some()
    write_imatrix(path, wanted)
    got = read_imatrix(path).entries["blk.1.ffn_up_exps.weight"].by_matrix(3).mean_squares
    means = wanted.entries["blk.1.ffn_up_exps.weight"].mean_squares
    np.testing.assert_allclose(got[[0, 2]], means[[0, 2]], rtol=1e-6)
    assert (got[1] == 1).all()  # as llama.cpp writes them


GOOD = dat({"blk.0.ffn_up.weight": (2, [1, 2, 3])}, struct.pack("<ii", 1, 24) + b"." * 24)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "the number of entries needs 4 bytes"),
        (struct.pack("<i", -1), "byte 0: -1 entries"),
        (struct.pack("<i", 1 << 30) + b"\0" * 64, "byte 0: 1073741824 entries"),
        (struct.pack("<ii", 1, 1 << 30) + b"\0" * 64, "a name of 1073741824 bytes"),
        (GOOD[:-36], "the numbers of .* needs 12 bytes"),
        (dat({"a": (0, [1.0])}), "0 calls"),
        (dat({"a": (1, [])}), "0 columns"),
        (dat({"a": (1, [np.nan])}), "finite and not negative"),
        (dat({"a": (1, [-1.0])}), "finite and not negative"),
        (GOOD[:-28] + struct.pack("<i", -5), "the dataset of -5 bytes"),
        (struct.pack("<i", 2) + dat({"a": (1, [1.0])})[4:] * 2, "a second time"),
    ],
)
def test_hostile_dat_files_are_told_by_byte(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        read_imatrix(path)


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", some())
    path = tmp_path / "cut"
    for data in (GOOD, (tmp_path / "m.gguf").read_bytes()):
        step = max(1, len(data) // 97)
        for size in range(0, len(data) - 32, step):  # what is behind may be padding
            path.write_bytes(data[:size])
            try:
                read_imatrix(path)
            except CheckpointError:
                continue
            raise AssertionError(f"{size} of {len(data)} bytes were read")


@pytest.mark.parametrize(
    ("kind", "tensors", "match"),
    [
        ("model", {"a.in_sum2": (1, 4), "a.counts": (1, 1)}, "general.type is 'model'"),
        ("imatrix", {"a": (1, 4)}, "no tensor that ends in .in_sum2"),
        ("imatrix", {"a.in_sum2": (1, 4)}, "'a.in_sum2' has no 'a.counts'"),
        ("imatrix", {"a.in_sum2": (3, 4), "a.counts": (2, 1)}, "3 matrices, 2 counts"),
        ("imatrix", {"a.in_sum2": (1, 4), "a.counts": (1, 1, "nan")}, "holds what is no count"),
        ("imatrix", {"a.in_sum2": (1, 4, "nan"), "a.counts": (1, 1)}, "finite and not negative"),
    ],
)
def test_hostile_gguf_files_are_told_by_tensor(
    tmp_path: Path, kind: str, tensors: dict[str, tuple[object, ...]], match: str
) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for name, (rows, columns, *more) in tensors.items():
        writer.add_tensor(name, np.full((rows, columns), np.nan if more else 1, F))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=match):
        read_imatrix(path)
