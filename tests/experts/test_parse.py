"""One reader of methods and formats, whoever asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktk import backends
from ktk.convert import convert
from ktk.experts.formats import BLOCKS, PANELS

ALL = {
    "int4": ("auto", "int4", None, "ktk", False),
    "int4:64": ("auto", "int4", 64, "ktk", False),
    "INT4:0": ("auto", "int4", 0, "ktk", False),
    "AMXINT4": ("AMXINT4", "int4", None, "ktk", False),
    "avx2:int4:128": ("AVX2", "int4", 128, "ktk", False),
    "Q4_K": ("LLAMAFILE", "Q4_K", None, "ktk", False),
    "q4_k:ggml": ("LLAMAFILE", "Q4_K", None, "ggml", False),
    "LLAMAFILE:Q4_K:repack": ("LLAMAFILE", "Q4_K", None, "ktk", True),
    "bf16": ("auto", "bf16", None, "ktk", False),
    "llamafile:bf16": ("LLAMAFILE", "BF16", None, "ktk", False),
    "auto:fp8": ("auto", "fp8", None, "ktk", False),
}


@pytest.mark.parametrize("text", ALL)
def test_what_users_write_is_read(text: str) -> None:
    got = backends.parse_method(text)
    name = got.format and got.format.name
    assert (got.backend, name, got.group_size, got.by, got.is_repacked) == ALL[text]
    assert got.format is (BLOCKS if got.block_type else PANELS)[name]


def test_a_backend_alone_names_no_format() -> None:
    for text in ("auto", "AVX2", "numpy"):
        assert backends.parse_method(text).format is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int5", "format 'int5': must be one of"),
        ("", "format '': must be one of"),
        ("int4:48", "int4 takes groups of 32, 64, 128, 0"),
        ("int4:-1", "int4 takes groups of"),
        ("int4:64:64", "nothing may stand behind '64'"),
        ("Q4_K:64", "only :repack or :ggml"),
        ("AVX2:Q4_K", "format 'Q4_K': must be one of nl2, nl3, nl4"),
        ("LLAMAFILE:int4", "format 'int4': must be one of IQ1_S"),
        ("gguf", "format 'gguf': must be one of"),
    ],
)
def test_what_is_none_says_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="must be FORMAT") as caught:
        backends.parse_method(text)
    assert why in str(caught.value)


def test_convert_reads_the_same(tmp_path: Path) -> None:
    for text in ("Q4_K:ggml", "Q4_K:repack"):
        with pytest.raises(ValueError, match="must name a format alone"):
            convert(tmp_path, tmp_path / "out.gguf", quant_method=text)
    with pytest.raises(ValueError, match="group_size=32: quant_method='int4:64' has another"):
        convert(tmp_path, tmp_path / "out", quant_method="int4:64", group_size=32)
