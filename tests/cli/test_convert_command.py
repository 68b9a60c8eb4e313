"""``ktk convert``: what it prints, and its errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktk.checkpoint import read_config
from ktk.convert.run import Summary
from make.checkpoints import (
    make,
)
from make.conversions import run_convert
from make.forked import ktk


def test_command_converts_and_reports(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    arguments = ("-i", tmp_path / "in", "-o", tmp_path / "out", "--group-size", 64)
    done = run_convert(*arguments, "--quant-method", "int4")
    assert done.returncode == 0, done.stderr
    assert "2 layers of 3 experts, deepseek bf16 -> int4" in done.stdout
    assert done.stderr == ""
    assert read_config(tmp_path / "out").specs[0].group_size == 64
    done = run_convert(*arguments, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused_layers"] == 2


def test_a_rotation_is_written_and_reported(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek")
    arguments = ("-i", tmp_path / "in", "-o", tmp_path / "out", "--quant-method", "int8")
    done = run_convert(*arguments, "--rotation", "256", "--activation-group", "256")
    assert done.returncode == 0, done.stderr
    assert "-> int8 rotated by 256, " in done.stdout
    assert read_config(tmp_path / "out").specs[0].turns == (256, 0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--quant-method", "int3"), "quant_method='int3'"),
        (("--rotation", "32"), "rotation=32: the width must be 0, 64 or 256"),
        (("--input-type", "fp8"), "input_type='fp8'"),
        (("-i", "/nothing/here"), "no such file or directory"),
    ],
)
def test_command_says_errors_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], match: str
) -> None:
    make(tmp_path / "in", "deepseek")
    done = run_convert("-i", tmp_path / "in", "-o", tmp_path / "out", *arguments)
    assert done.returncode == 1
    assert match in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_the_command_writes_a_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", "mixtral")
    arguments = ["convert", "-i", "in", "-o", "m.gguf", "--quant-method", "q8_0"]
    monkeypatch.chdir(tmp_path)
    done = ktk(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert Summary(**{**said, "notes": tuple(said["notes"])}).weight_format == "Q8_0"
    again = ktk(*arguments)
    assert again.returncode == 1 and "exists; give another output" in again.stderr
