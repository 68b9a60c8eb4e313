"""Conversions that are refused, before anything is written; sources that turn out bad later."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktk.checkpoint import Checkpoint
from ktk.convert.run import Progress, convert
from ktk.errors import CheckpointError
from make.checkpoints import (
    make,
    write_safetensors,
)
from make.conversions import contents


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quant_method": "int3"}, "quant_method='int3'"),
        ({"quant_method": "fp32"}, "quant_method='fp32'"),
        ({"input_type": "fp8"}, "input_type='fp8': the experts of .* are bf16"),
        ({"input_type": "float"}, "input_type='float': must be one of fp32"),
        ({"group_size": 48}, "group_size=48"),
        ({"quant_method": "int8", "group_size": 32}, "group_size=32: int8"),
        ({"activation_group": 7}, "activation_group=7"),
        ({"rotation": 32}, "rotation=32: the width must be 0, 64 or 256"),
        ({"rotation": "64"}, "rotation='64': must be a width"),
        ({"quant_method": "bf16", "rotation": 64}, "rotation=64: bf16 takes 0"),
        ({"threads": 0}, "threads=0"),
        ({"threads": True}, "threads=True"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    make(tmp_path / "in", "deepseek")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() or not contents(tmp_path / "out")


def test_output_in_the_input_or_not_empty_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")
    before = contents(source)
    for output in (source, source / "out", tmp_path / "x" / ".." / "in" / "y"):
        with pytest.raises(ValueError, match="lies in the input"):
            convert(source, output)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="lies in the input"):
        convert(source, tmp_path / "link" / "out")
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty.*--resume"):
        convert(source, output)
    with pytest.raises(FileExistsError, match="nothing to resume"):
        convert(source, output, resume=True)
    (output / "notes.txt").rename(tmp_path / "file")
    with pytest.raises(FileExistsError, match="not a directory"):
        convert(source, tmp_path / "file")
    assert contents(output) == {}
    assert contents(source) == before


def test_packed_directory_is_not_converted_again(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a packed directory already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_second_conversion_into_the_same_place_waits_outside(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")

    def meddle(_: Progress) -> None:
        with pytest.raises(FileExistsError, match="another conversion"):
            convert(tmp_path / "in", tmp_path / "out", resume=True)

    convert(tmp_path / "in", tmp_path / "out", progress=meddle)


def test_nan_weight_names_layer_and_expert(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")
    with Checkpoint.open(source) as checkpoint:
        info = checkpoint.tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with open(source / "model.safetensors", "r+b") as file:
        file.seek(info.begin)
        file.write(b"\xc0\x7f")
    with pytest.raises(CheckpointError, match="layer 1 expert 2: .*NaN"):
        convert(source, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        "ktk-convert.json",
        "ktk-experts-00000.safetensors",
    ]


def test_source_truncated_on_the_way_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")

    def cut(_: Progress) -> None:
        os.truncate(source / "model.safetensors", 20_000)

    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "out", threads=1, progress=cut)
    assert not (tmp_path / "out" / "config.json").exists()


def test_source_changed_on_the_way_is_an_error(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")

    def touch(_: Progress) -> None:
        os.utime(tmp_path / "in" / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"model.safetensors changed while it was converted"):
        convert(tmp_path / "in", tmp_path / "out", progress=touch)
    assert not (tmp_path / "out" / "config.json").exists()


def test_foreign_quantisation_outside_the_experts_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make(source, "deepseek")
    (source / "model.safetensors").rename(source / "first.safetensors")
    for name, array, match in (
        ("q_proj.qweight", np.zeros((2, 2), np.int64), "is named as GPTQ names it"),
        ("q_proj.weight", ("F8_E4M3", np.zeros((2, 2), np.uint8)), "scale tensor is missing"),
    ):
        write_safetensors(source / "second.safetensors", {name: array})
        with pytest.raises(CheckpointError, match=match):
            convert(source, tmp_path / "out")
