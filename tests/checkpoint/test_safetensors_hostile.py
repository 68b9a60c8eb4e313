"""Whatever is wrong with a file, the reader says so in a CheckpointError and allocates nothing
for a lie.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.checkpoint import Checkpoint, list_layers, packed, read_config, read_layer, write_layer
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.layout import LAYOUT_VERSION
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.quantise.pack import pack_expert
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


# packed directories


SPEC = MoESpec(3, 64, 32, activation=Activation.silu(7.0), has_bias=True)


def spans(spec: MoESpec, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(spec.num_experts):
        i, h = spec.intermediate_size, spec.hidden_size
        shapes = [(i, h), (i, h), (h, i), (i,), (i,), (h,)][: 6 if spec.has_bias else 3]
        weights = ExpertWeights(*(rng.standard_normal(s).astype(np.float32) for s in shapes))
        span = np.empty(spec.layout.expert_bytes, np.uint8)
        pack_expert(spec, weights, span)
        out.append(span)
    return out


def test_packed_layer_comes_back_and_lies_at_a_page(tmp_path: Path) -> None:
    from safetensors import safe_open

    written = spans(SPEC)
    path = write_layer(tmp_path, SPEC, 7, written)
    assert list_layers(tmp_path) == (7,)
    assert [p.name for p in tmp_path.iterdir()] == ["ktk-experts-00007.safetensors"]
    got = read_layer(tmp_path, 7)
    assert got.spec == SPEC
    np.testing.assert_array_equal(got.data, np.stack(written))
    assert got.data.ctypes.data % 4096 == 0
    raw = path.read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
    with safe_open(path, "np") as official:
        np.testing.assert_array_equal(official.get_tensor("experts"), np.stack(written))
        assert json.loads(official.metadata()["ktk"])["layer"] == 7
    assert write_layer(tmp_path, SPEC, 7, written).read_bytes() == raw


@pytest.mark.parametrize("fault", ["few", "many", "size", "dtype", "raises"])
def test_failed_write_leaves_no_file(tmp_path: Path, fault: str) -> None:
    written: Any = spans(SPEC)
    if fault == "few":
        written.pop()
    elif fault == "many":
        written.append(written[0])
    elif fault == "size":
        written[1] = written[1][:-1]
    elif fault == "dtype":
        written[1] = written[1].view(np.int8)
    else:
        written = (1 / 0 for _ in range(1))
    with pytest.raises((ValueError, ZeroDivisionError)):
        write_layer(tmp_path, SPEC, 0, written)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight_format", ["int4", "int8", "bf16"])
def test_nan_scale_or_bias_is_refused_by_expert_and_projection(
    tmp_path: Path, weight_format: str
) -> None:
    spec = MoESpec(3, 64, 32, weight_format=weight_format, has_bias=True)
    layout = spec.layout
    places = {
        "gate bias": layout.gate_bias_offset,
        "up bias": layout.up_bias_offset,
        "down bias": layout.down_bias_offset,
    }
    if weight_format != "bf16":
        gate_up, down = layout.gate_up, layout.down
        places["gate projection"] = 0
        places["up projection"] = gate_up.panel_bytes
        places["down projection"] = layout.down_offset + 3 * down.panel_bytes
    for name, offset in places.items():
        for value in (np.nan, np.inf, -np.inf):
            written = spans(spec)
            wide = name.endswith("bias") or weight_format == "int8"
            bits = np.array([value], np.float32).view(np.uint8)
            written[2][offset : offset + (4 if wide else 2)] = bits if wide else bits[2:]
            write_layer(tmp_path, spec, 0, written)
            with pytest.raises(
                CheckpointError, match=f"layer 0 expert 2: {name}: .* NaN or infinite"
            ):
                read_layer(tmp_path, 0)


def layer_with(path: Path, **changes: Any) -> None:
    """A layer file whose metadata says something else than its data."""
    said = {"layer": 0, "layout_version": LAYOUT_VERSION, "spec": SPEC.to_json()}
    for key, value in changes.items():
        if key in said:
            said[key] = value
        else:
            said["spec"][key] = value
    size = 3 * SPEC.layout.expert_bytes
    header = {
        "__metadata__": {"ktk": json.dumps(said)},
        "experts": entry("U8", [3, SPEC.layout.expert_bytes], 0, size),
    }
    raw_file(path / "ktk-experts-00000.safetensors", header, bytes(size))


BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "another layout": ({"layout_version": LAYOUT_VERSION + 1}, "convert the checkpoint again"),
    "layout a bool": ({"layout_version": True}, "convert the checkpoint again"),
    "layout missing": ({"layout_version": None}, "convert the checkpoint again"),
    "another layer": ({"layer": 3}, "holds layer 3"),
    "spec a list": ({"spec": []}, "must be an object"),
    "spec empty": ({"spec": {}}, "missing"),
    "unknown field": ({"spec": {**SPEC.to_json(), "x": 1}}, "unknown fields"),
    "unknown format": ({"weight_format": "int3"}, "weight_format"),
    "format a list": ({"weight_format": []}, "weight_format"),
    "group of 48": ({"group_size": 48}, "group_size"),
    "group a float": ({"group_size": 32.0}, "group_size"),
    "group false": ({"group_size": False}, "group_size"),
    "experts negative": ({"num_experts": -3}, "num_experts"),
    "experts text": ({"num_experts": "3"}, "num_experts"),
    "experts too many": ({"num_experts": 4}, "its spec needs"),
    "sizes huge": ({"hidden_size": 2**24, "intermediate_size": 2**24}, "its spec needs"),
    "hidden other": ({"hidden_size": 1024}, "its spec needs"),
    "bias a text": ({"has_bias": "no"}, "has_bias"),
    "activation a list": ({"activation": []}, "activation|ktk metadata"),
    "activation unknown": ({"activation": {"kind": "tanh"}}, "activation kind"),
    "activation alpha text": ({"activation": {"alpha": "1"}}, "ktk metadata"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_lying_metadata_of_a_layer_is_refused(tmp_path: Path, case: str) -> None:
    changes, names = BAD_SPECS[case]
    layer_with(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"ktk-experts-00000.*({names})"):
        read_layer(tmp_path, 0)


def test_files_that_are_no_layer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ktk-experts-00000.safetensors"
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_layer(tmp_path, 0)
    raw_file(path, GOOD, bytes(29))
    with pytest.raises(CheckpointError, match="not a layer file"):
        read_layer(tmp_path, 0)
    raw_file(path, {"__metadata__": {"ktk": "{"}, "experts": entry("U8", [29], 0, 29)}, bytes(29))
    with pytest.raises(CheckpointError, match="ktk metadata"):
        read_layer(tmp_path, 0)
    write_layer(tmp_path, SPEC, 0, spans(SPEC))
    whole = path.read_bytes()
    for size in random.Random(0).sample(range(len(whole)), 20):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="ktk-experts-00000"):
            read_layer(tmp_path, 0)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (None, "not a packed directory"),
        ({"quant_method": "fp8"}, "not a packed directory"),
        ({"quant_method": "ktk"}, "layout version None"),
        ({"quant_method": "ktk", "layout_version": 99}, "convert the checkpoint again"),
        ({"quant_method": "ktk", "layout_version": LAYOUT_VERSION}, "layers"),
        ({"quant_method": "ktk", "layout_version": LAYOUT_VERSION, "layers": [True]}, "layers"),
        ({"quant_method": "ktk", "layout_version": LAYOUT_VERSION, "layers": [-1]}, "layers"),
        ({"quant_method": "ktk", "layout_version": LAYOUT_VERSION, "layers": [0, 1]}, "00001"),
        (
            {
                "quant_method": "ktk",
                "layout_version": LAYOUT_VERSION,
                "layers": [0],
                "group_size": 64,
            },
            "mixes",
        ),
    ],
)
def test_bad_config_of_a_packed_directory_is_refused(tmp_path: Path, said: Any, names: str) -> None:
    write_layer(tmp_path, SPEC, 0, spans(SPEC))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    with pytest.raises(CheckpointError, match=names):
        read_config(tmp_path)


def test_unfinished_conversion_says_to_resume(tmp_path: Path) -> None:
    (tmp_path / packed.STATE_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="--resume"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        read_config(tmp_path / "nothing")
