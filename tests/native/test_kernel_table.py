"""One table of kernels: every level has one for every format,
and every symbol stands in its source.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ktk._cy import native_module
from ktk._cy.isa import ISA_ROWS
from ktk.experts.formats import PANELS

ROOT = Path(__file__).parents[2]
LEVELS = [row.name for row in ISA_ROWS]
pytestmark = pytest.mark.skipif(native_module() is None, reason="the extension is not built")


def sources() -> dict[Path, str]:
    """The text of every C source and header of the kernels."""
    folders = (
        ROOT / "ktk/_cy/kernels",
        ROOT / "vendor/llamafile",
        ROOT / "vendor/llamafile/blocks",
    )
    return {path: path.read_text() for folder in folders for path in folder.glob("*.[ch]")}


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_takes_what_it_has_not_from_the_one_below(level: str) -> None:
    """Its own kernels: packed integers and bf16 on tiles, BF16 blocks with VDPBF16PS,
    everything up to VNNI but codes of checkpoints, which have no use for it.
    """
    native = native_module()
    coded = {f.name for f in PANELS.values() if not f.is_integer and f.scales}
    below = LEVELS[: LEVELS.index(level) + 1]
    for name in native.formats():
        own = {"avx2", "avx512"} if name in coded else {"avx2", "avx512", "avx512vnni"}
        own |= {"amx"} if name in ("nl2", "nl3", "nl4", "int4", "int8") else set()
        own |= {"amxbf16"} if name == "bf16" else set()
        own |= {"avx512bf16"} if name == "BF16" else set()
        assert native.kernel_isa(level, name) == [isa for isa in below if isa in own][-1]


def test_an_unknown_level_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=f"isa='sse2': this build has {', '.join(LEVELS)}"):
        native_module().kernel_isa("sse2", "int4")


def test_every_symbol_of_a_kernel_stands_in_its_source() -> None:
    """Names are pasted together from the level and the format;
    a profile's must be found by grep.
    """
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--defined-only", native_module().__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(rf"\b(?:ktk|lf)_\w+_(?:{'|'.join(LEVELS)})\b")
    built = {name for name in listed if pattern.fullmatch(name)}
    assert built
    text = "\n".join(sources().values())
    assert built == set(pattern.findall(text))
