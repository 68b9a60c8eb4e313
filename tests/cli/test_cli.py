"""The command line as a person meets it: help, exit codes, JSON, one line per error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ktk import __version__, backends
from ktk._cy import native_module
from ktk.cli import COMMANDS
from ktk.experts.formats import PANELS
from ktk.placement.blocks import kernel_types
from make.forked import ktk


def test_help_lists_every_command_and_version_prints() -> None:
    command = [sys.executable, "-m", "ktk", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    for name in COMMANDS:
        assert name in done.stdout
    assert ktk("--version").stdout.strip() == f"ktk {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = ktk(name, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_the_help_of_convert_tells_the_formats_own_groups() -> None:
    said = " ".join(ktk("convert", "--help").stdout.replace("│", " ").split())
    groups = {
        name: PANELS[name].default_activation_group
        for name in ("int4", "int8", "nl2", "nl3", "nl4")
    }
    assert groups["int8"] == groups["nl2"] == groups["nl3"] == groups["nl4"]
    assert f"{groups['int4']} for int4, {groups['int8']} for int8 and nl2 to nl4" in said
    turned = [name for name, fmt in PANELS.items() if fmt.default_rotation]
    assert sorted(turned) == ["int8", "nl2", "nl3", "nl4"]
    assert f"{PANELS['int8'].default_rotation} for int8 and nl2 to nl4" in said


def test_doctor_tells_each_backend_as_json_and_as_a_table() -> None:
    done = ktk("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [b["name"] for b in found["backends"]] == [r.name for r in backends.report()]
    for b in found["backends"]:
        assert b["runs"] == (b["reason"] is None) == bool(b["kernel"])
    assert "LLAMAFILE" in [b["name"] for b in found["backends"]]
    table = ktk("doctor").stdout
    for b in found["backends"]:
        assert (b["kernel"] if b["runs"] else b["reason"]) in table


def test_doctor_shows_what_is_switched_off() -> None:
    found = json.loads(ktk("doctor", "--json", KTK_DISABLE_CPU_FEATURES="avx512,avx2").stdout)
    runs = {b["name"]: b["runs"] for b in found["backends"]}
    assert not runs["AVX512"] and not runs["AVX2"] and runs["NUMBA"] and runs["NUMPY"]


@pytest.mark.skipif(native_module() is None, reason="the compiled extension is not built")
def test_doctor_tells_how_each_gguf_type_runs() -> None:
    found = json.loads(ktk("doctor", "--json").stdout)["gguf_types"]
    if backends.backends()["LLAMAFILE"].why_not() is not None:
        pytest.skip("LLAMAFILE does not run")
    assert sorted(found["kernel"]) == sorted(kernel_types())
    assert "NVFP4" in found["float_copies"]
    assert found["packed_anew"] == []
    table = ktk("doctor").stdout
    assert " ".join(found["kernel"][:6]) in table and "no kernel reads them" in table


def test_doctor_says_that_gguf_types_are_packed_where_no_kernel_reads_them() -> None:
    done = ktk("doctor", "--json", KTK_DISABLE_CPU_FEATURES="avx512,avx2")
    found = json.loads(done.stdout)["gguf_types"]
    assert "Q4_K" in found["packed_anew"]
    assert not found["kernel"] and not found["float_copies"]


def test_an_error_is_one_line_and_exit_code_1() -> None:
    done = ktk("doctor", KTK_NONSENSE="1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ktk: error: environment variable KTK_NONSENSE is unknown")
    assert done.stderr.count("\n") == 1
    assert ktk("convert", "--input-path", "/nowhere", "--output", "/nowhere/out").returncode == 1


def test_debug_shows_the_traceback() -> None:
    done = ktk("convert", "--input-path", "/nowhere", "--output", "/nowhere/out", KTK_LOG="debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert ktk("doctor", "--colour").returncode == 2
    assert ktk("nonsense").returncode == 2
