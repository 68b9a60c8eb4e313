"""constraints.txt pins what pyproject.toml asks for;
the tools behind `make lock` and `make test-versions` read both right.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import lock
import pytest
import requirements
import run
from requirements import CONSTRAINTS, all_required, lowest, name_of, pinned

REPORT = """<testsuites><testsuite>
  <testcase classname="test_a" name="good"/>
  <testcase classname="test_a" name="bad"><failure message="no"/></testcase>
  <testcase classname="test_b" name="left"><skipped message="CPU"/></testcase>
  <testcase classname="test_b" name="broken"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_every_line_pins_one_release_of_any_build_from_any_index() -> None:
    lines = [x for x in CONSTRAINTS.read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines), lines
    assert len({name_of(line) for line in lines}) == len(lines) > 50


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pins = pinned()
    for requirement in all_required():
        name, bound = name_of(requirement), requirement.partition(">=")[2]
        assert numbers(pins[name]) >= numbers(bound), requirement


def test_make_installs_nothing_that_is_not_pinned() -> None:
    """Of `make demo`, `make test` and `make wheel`, and what builds are given too."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    said = subprocess.run(
        ["make", "-n", "-B", "demo", "test", "wheel"],
        cwd=requirements.ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")},
        capture_output=True,
        text=True,
        check=True,
    )
    pip = [line for line in said.stdout.splitlines() if "-m pip " in line]
    assert sum(" install " in line for line in pip) >= 4, said.stdout
    held = "PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt "
    assert [line for line in pip if not line.startswith(held)] == []


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_requirements_are_read() -> None:
    assert name_of("Prometheus_Client>=0.20") == "prometheus-client"
    assert name_of("ktk[serve]") == "ktk"
    assert lowest("numpy>=2.0") == "numpy==2.0"
    with pytest.raises(AssertionError, match="must be name>=version"):
        lowest("numpy~=2.0")
    assert {"numpy", "transformers", "fastapi", "pytest", "cython"} <= set(
        map(name_of, all_required())
    )
    assert lock.OF_CUDA.match("nvidia-cublas-cu12")
    assert not lock.OF_CUDA.match("torch")


def test_the_oldest_environment_is_every_lower_bound_and_a_line_differs_in_one_pin() -> None:
    found = {e.name: e for e in run.environments()}
    oldest = found["oldest"].requirements
    assert {lowest(r) for r in requirements.required(*run.EXTRAS)} == set(oldest)
    assert not found["newest"].requirements and not found["newest"].constraints
    for name, pin in run.LINES.items():
        own = set(found[name].constraints) - {f"{n}=={v}" for n, v in pinned().items()}
        assert own == {pin}


def test_a_run_is_counted_from_its_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    result = run.counted("newest", {"numpy": "2.4"}, report)
    assert (result.passed, result.skipped) == (1, 1)
    assert result.failed == ("test_a::bad", "test_b::broken")
    assert "| 2.4 |" in result.row()
    assert "1 passed, 1 skipped, 2 failed" in result.row()


def test_every_pattern_finds_tests() -> None:
    assert all(list((requirements.ROOT / "tests").glob(pattern)) for pattern in run.TESTS)
