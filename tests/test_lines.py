"""No line of Cython, C or Markdown's prose is longer than 100 columns; ruff sees to Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from make import ROOT

WIDTH = 100
TABLES = {"vendor/llamafile/grids.h", "vendor/llamafile/test_vectors.h"}  # generated
FOLDERS = ("ktk", "vendor", "docs", "bench", "tests")
FILES = sorted(
    file
    for end in ("pyx", "pxd", "pxi", "c", "h", "md")
    for place in (f"*.{end}", *(f"{folder}/**/*.{end}" for folder in FOLDERS))
    for file in ROOT.glob(place)
    if str(file.relative_to(ROOT)) not in TABLES
    and not (end == "c" and file.with_suffix(".pyx").exists())  # what Cython wrote
)


def long_lines(text: str, is_markdown: bool) -> list[str]:
    """Tables, code and pictures of Markdown are as wide as they must be."""
    found, is_code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        is_code ^= is_markdown and line.lstrip().startswith("```")
        is_prose = not is_markdown or not (is_code or line.lstrip().startswith(("|", "<", "![")))
        if len(line) > WIDTH and is_prose:
            found.append(f"{number}: {line}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_line_is_too_long(file: Path) -> None:
    assert long_lines(file.read_text(), file.suffix == ".md") == []


def test_the_check_sees_a_long_line() -> None:
    long = "x" * 101
    assert long_lines(f"a\n{long}", False) == [f"2: {long}"] == long_lines(f"a\n{long}", True)
    assert long_lines(f"```\n{long}\n```\n| {long}", True) == []
