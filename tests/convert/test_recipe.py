"""Recipes: what a file says, and what convert makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import ktk
from ktk.checkpoint import read_config, read_layer
from ktk.convert.recipe import Coding, Recipe, experts_name
from ktk.convert.run import convert
from make.checkpoints import make
from make.conversions import packed_by_hand

RULES = """
# early layers, and whatever comes to down
^blk\\.0\\.   = nl4:32   # a group
ffn_down      = q8_0
"""


def test_the_first_pattern_that_is_found_counts() -> None:
    recipe = Recipe.parse(RULES)
    assert str(recipe.coding("blk.0.ffn_down_exps.weight")) == "nl4:32"
    assert str(recipe.coding("blk.10.ffn_down_exps.weight")) == "q8_0"
    assert recipe.coding("blk.10.ffn_up_exps.weight") is None
    assert Recipe.parse(str(recipe)) == Recipe(recipe.rules)


def test_what_was_chosen_is_read_again_as_it_was() -> None:
    types = [Coding.parse(name) for name in ("nl4:32", "nl3", "int8")]
    chosen = {
        (n, p): types[(n * 7 + len(p)) % 3] for n in range(23) for p in ("gate", "up", "down")
    }
    recipe = Recipe.parse(str(Recipe.of_experts(chosen)))
    assert {key: recipe.coding(experts_name(*key)) for key in chosen} == chosen
    assert len(recipe.rules) == 9


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("blk = nl4\nblk nl3", "line 2: 'blk nl3': must be PATTERN = FORMAT"),
        ("= nl4", "line 1.*must be PATTERN = FORMAT"),
        ("blk.(0 = nl4", "line 1.*unterminated subpattern"),
        ("blk = nl5", "line 1.*must be one of"),
        ("blk = nl4:48", "line 1.*nl4 takes groups of 16, 32, 0"),
        ("blk = Q4_K:ggml", "line 1.*must name a format alone"),
        ("# nothing\n", "has no rule"),
    ],
)
def test_what_is_no_recipe_is_told_by_line(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recipe.parse(text)


def test_layers_of_a_packed_directory_get_their_formats(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek", sizes=(3, 2, 128, 64))
    recipe = Recipe.parse("blk.0 = int8\nblk.1 = nl4:32\nblk = nl3")
    output = tmp_path / "out"
    summary = convert(tmp_path / "in", output, recipe=recipe, threads=1)
    assert (summary.weight_format, summary.group_size) == ("nl3+nl4+int8", None)
    said = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (said["weight_format"], said["group_size"], said["rotation"]) == (None, None, [64, 0])
    specs = read_config(output).specs
    assert [s.weight_format for s in specs.values()] == ["int8", "nl4", "nl3"]
    for layer, options in enumerate(({"weight_format": "int8"}, {"group_size": 32}, {})):
        wanted = packed_by_hand(
            tmp_path / "in", layer, **{"weight_format": specs[layer].weight_format, **options}
        )
        np.testing.assert_array_equal(read_layer(output, layer).data, wanted)
        assert np.isfinite(ktk.MoE.load(output, layer).bits_per_weight)
    (output / "config.json").unlink()
    other = Recipe.parse("blk.1 = int8\nblk.0 = nl4:32\nblk = nl3")
    with pytest.raises(ValueError, match="was begun with recipe="):
        convert(tmp_path / "in", output, recipe=other, resume=True)
    again = convert(tmp_path / "in", output, recipe=recipe, resume=True)
    assert again.reused_layers == 3


def test_matrices_of_a_gguf_file_get_their_types(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek", sizes=(2, 2, 256, 256))
    recipe = Recipe.parse("ffn_down = q6_k\nblk.1.ffn_gate = f16")
    output = tmp_path / "m.gguf"
    summary = convert(tmp_path / "in", output, quant_method="q4_0", recipe=recipe)
    assert summary.weight_format == "Q4_0+Q6_K+F16"
    reader = gguf.GGUFReader(output)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    for layer, gate in ((0, "Q4_0"), (1, "F16")):
        found = [types[experts_name(layer, name)] for name in ("gate", "up", "down")]
        assert found == [gate, "Q4_0", "Q6_K"]


@pytest.mark.parametrize(
    ("output", "method", "text", "match"),
    [
        ("out", None, "ffn_down = nl4\nblk = nl3", "layer 0 would have gate nl3, up nl3, down nl4"),
        ("out", None, "ffn_down = nl4", "no pattern is in blk.0.ffn_gate_exps.weight"),
        ("out", "nl4", "blk = q4_k", "q4_k .recipe. writes a GGUF file"),
        ("m.gguf", "q4_0", "blk = nl4", "nl4 .recipe. writes a directory"),
        ("out", "nl4", "blk.7 = nl3", "'blk.7' is in no name"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(
    tmp_path: Path, output: str, method: str | None, text: str, match: str
) -> None:
    make(tmp_path / "in", "deepseek", sizes=(2, 2, 128, 64))
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "in", tmp_path / output, quant_method=method, recipe=Recipe.parse(text))
    assert not (tmp_path / output).exists()
