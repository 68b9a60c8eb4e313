"""Packed directories come back as they were written, and what is wrong with one is a
CheckpointError that names the file.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktk.checkpoint import list_layers, packed, read_config, read_layer, write_layer
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.layout import LAYOUT_VERSION
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.quantise.pack import pack_expert
from make.cases import assert_exact
from make.checkpoints import raw_file

SPEC = MoESpec(3, 64, 32, activation=Activation.silu(7.0), has_bias=True)


def entry(num_bytes: int, *rows: int) -> dict[str, Any]:
    """Of a tensor of bytes that is the whole file."""
    shape = [*rows, num_bytes // (rows[0] if rows else 1)]
    return {"dtype": "U8", "shape": shape, "data_offsets": [0, num_bytes]}


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
    header = {"__metadata__": {"ktk": json.dumps(said)}, "experts": entry(size, 3)}
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
    "rotation of 7": ({"rotation": 7}, "the width must be 0, 64 or 256"),
    "rotation negative": ({"rotation": -64}, "the width must be 0, 64 or 256"),
    "rotation a text": ({"rotation": "64"}, "must be a width, or a width and a seed"),
    "rotation null": ({"rotation": None}, "must be a width, or a width and a seed"),
    "rotation true": ({"rotation": True}, "the width must be 0, 64 or 256"),
    "rotation an object": ({"rotation": {"width": 64}}, "must be a width, or a width and a seed"),
    "rotation of nothing": ({"rotation": []}, "must be a width, or a width and a seed"),
    "rotation of lists": ({"rotation": [[64], [0]]}, "the width must be 0, 64 or 256"),
    "rotation a float": ({"rotation": [64.0, 0]}, "the width must be 0, 64 or 256"),
    "rotation of three": ({"rotation": [64, 0, 0]}, "must be a width, or a width and a seed"),
    "seed negative": ({"rotation": [64, -1]}, "the seed must be 0 to"),
    "seed too large": ({"rotation": [64, 2**40]}, "the seed must be 0 to"),
    "seed of no rotation": ({"rotation": [0, 1]}, "0 without one"),
    "rotation of floats": (
        {"weight_format": "bf16", "group_size": 0, "activation_group": 0, "rotation": [64, 0]},
        "bf16 takes 0",
    ),
    "rotation of blocks": (
        {"weight_format": "gguf", "group_size": 0, "activation_group": 64, "rotation": [64, 0]},
        "gguf takes 0",
    ),
    "blocks of a GGUF file": (
        {"weight_format": "gguf", "group_size": 0, "activation_group": 64},
        "weight_format='gguf': must be one of nl2, nl3, nl4, int4",
    ),
    "rotation that widens": ({"hidden_size": 544, "rotation": [256, 0]}, "its spec needs"),
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


@pytest.mark.parametrize(("name", "is_read"), [("int4", True), ("mxfp4", True), ("fp8", False)])
def test_of_layout_2_only_fp8_is_refused(tmp_path: Path, name: str, is_read: bool) -> None:
    """Its codes lay in other places."""
    spec = MoESpec(1, 64, 32, name)
    data = np.zeros((1, spec.layout.expert_bytes), np.uint8)
    path = write_layer(tmp_path, spec, 0, data)
    said, raw = rb"layout_version\":%d", path.read_bytes()
    assert raw.count(said % LAYOUT_VERSION) == 1
    path.write_bytes(raw.replace(said % LAYOUT_VERSION, said % 2))
    if is_read:
        assert_exact(data, read_layer(tmp_path, 0).data)
        return
    with pytest.raises(CheckpointError, match="layout version 2.*convert the checkpoint again"):
        read_layer(tmp_path, 0)


def test_files_that_are_no_layer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ktk-experts-00000.safetensors"
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_layer(tmp_path, 0)
    raw_file(path, {"a": entry(29)}, bytes(29))
    with pytest.raises(CheckpointError, match="not a layer file"):
        read_layer(tmp_path, 0)
    raw_file(path, {"__metadata__": {"ktk": "{"}, "experts": entry(29)}, bytes(29))
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


def write_config(directory: Path, **said: Any) -> None:
    config = {"quant_method": "ktk", "layout_version": LAYOUT_VERSION, "layers": [0, 1], **said}
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))


def write_rotated(directory: Path, *rotations: int) -> None:
    """Layers of these rotations' widths."""
    for layer, width in enumerate(rotations):
        spec = dataclasses.replace(SPEC, rotation=width)
        write_layer(directory, spec, layer, spans(spec))


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ((0, 0), {}),
        ((0, 0), {"rotation": 0}),
        ((64, 64), {"rotation": [64, 0]}),
        ((64, 64), {"rotation": 64}),
        ((64, 64), {}),  # of converters that did not write it
        ((0, 64), {"rotation": None, "group_size": None}),  # as save_pretrained says it of both
    ],
)
def test_a_config_that_fits_its_layers_rotations_is_read(
    tmp_path: Path, widths: tuple[int, int], said: dict[str, Any]
) -> None:
    write_rotated(tmp_path, *widths)
    write_config(tmp_path, **said)
    specs = read_config(tmp_path).specs
    assert tuple(spec.turns.width for spec in specs.values()) == widths
    assert [packed.coding_of(spec).get("rotation") for spec in specs.values()] == [
        [width, 0] if width else None for width in widths
    ]


@pytest.mark.parametrize(
    ("widths", "said", "names"),
    [
        ((0, 64), {}, r"00001.*rotation=\[64, 0\], .*config.json says \[0, 0\].*mixes"),
        ((64, 0), {}, r"00001.*rotation=\[0, 0\], .*config.json says \[64, 0\].*mixes"),
        ((64, 256), {"rotation": [64, 0]}, r"00001.*rotation=\[256, 0\], .*mixes"),
        ((64, 64), {"rotation": 0}, r"00000.*rotation=\[64, 0\], .*mixes"),
        ((64, 64), {"rotation": [64, 1]}, r"00000.*config.json says \[64, 1\].*mixes"),
        ((0, 0), {"rotation": [64, 0]}, r"00000.*rotation=\[0, 0\], .*mixes"),
        ((0, 0), {"rotation": 7}, r"config.json: quantization_config: rotation=7: .* 0, 64 or 256"),
        ((0, 0), {"rotation": "64"}, r"config.json: .*rotation='64': must be a width"),
        ((0, 0), {"rotation": [64, 2**40]}, r"config.json: .*the seed must be 0 to"),
    ],
)
def test_a_config_of_another_rotation_is_refused(
    tmp_path: Path, widths: tuple[int, int], said: dict[str, Any], names: str
) -> None:
    write_rotated(tmp_path, *widths)
    write_config(tmp_path, **said)
    with pytest.raises(CheckpointError, match=names):
        read_config(tmp_path)
