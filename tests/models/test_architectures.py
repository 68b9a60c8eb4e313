"""The table of architectures: no name twice, no file left out,
what two rows could both read is one's.
"""

from __future__ import annotations

from pathlib import Path

import ktk.models.arch
from ktk.experts.activation import Activation
from ktk.models.arch import ARCHITECTURES, FAMILIES, PRE_TOKENIZERS, families_of
from ktk.models.arch.names import BLOCK_SPARSE_MOE, MLP_EXPERTS, STACKED


def twice(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def test_a_name_is_one_architectures() -> None:
    assert twice(["a", "b", "a"]) == ["a"]
    assert twice([name for row in ARCHITECTURES for name in row.model_types]) == []
    assert twice([row.gguf.name for row in ARCHITECTURES if row.gguf]) == []
    assert twice([name for row in PRE_TOKENIZERS for name in row.names]) == []
    families = {family for row in ARCHITECTURES for family in row.families}
    assert len(families) == len(FAMILIES)


def test_every_file_is_in_the_table() -> None:
    folder = Path(ktk.models.arch.__file__).parent
    files = {file.stem for file in folder.glob("*.py")} - {"__init__", "names"}
    in_files = {
        name
        for name in files
        for value in vars(getattr(ktk.models.arch, name)).values()
        if any(value is row for row in ARCHITECTURES)
    }
    assert in_files == files


def test_a_whole_model_has_a_name_in_both_worlds() -> None:
    for row in ARCHITECTURES:
        if row.whole is not None:
            assert row.gguf is not None and not row.gguf.refused and not row.refused
            assert row.whole.model_type == row.model_types[0]


def test_names_that_mean_two_things_are_read_by_one_family() -> None:
    gpt_oss = [family.name for family in families_of("gpt_oss")]
    assert "gpt_oss" in gpt_oss and "fused" not in gpt_oss and "deepseek" in gpt_oss
    for other in ("qwen3_moe", "openai_privacy_filter", "of nobody", ""):
        names = [family.name for family in families_of(other)]
        assert names == [name for name, family in FAMILIES.items() if not family.instead_of]
    assert FAMILIES["gpt_oss"].instead_of == "fused"


def test_names_that_several_share_mean_silu_where_nothing_says_more() -> None:
    for family in (MLP_EXPERTS, BLOCK_SPARSE_MOE, STACKED):
        first = next(row for row in ARCHITECTURES if family in row.families)
        assert first.activation == Activation.silu()
