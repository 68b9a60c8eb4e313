"""Metadata that cannot be meant is refused at every door, with file, key,
value and what is allowed; metadata that can be is not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk.cli import main
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.generate.describe import describe_model
from ktk.generate.open import open_model
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.loading import load_model
from ktk.models import Config, check_directory
from ktk.models.metadata import (
    CONFIG,
    GENERATION,
    GGUF,
    GGUF_TOKENIZER,
    ROPE,
    Rule,
    check_gguf,
    read_generation,
)
from ktk.ops.gguf_model import load_gguf
from make import gguf_files, whole_models
from make.families import NOT_BUILT, causal_families, small_config
from make.rewriting import rewritten
from make.transformers_cases import FAMILIES

# Values of another type than a rule's, by kind; and out of its range.
STRANGERS: dict[type, tuple[Any, ...]] = {
    int: ("many", {}, [[]], True, 1.5, -7, 1 << 70),
    float: ("much", {}, [[]], True, -2e30, float("nan"), float("inf")),
    bool: ("yes", {}, [], 1, 0.0),
    str: (7, {}, True, [3]),
    dict: (7, "text", [], True),
}


def strangers(rule: Rule) -> list[Any]:
    return [value for value in STRANGERS[rule.kind] if not (value == [] and rule.lists)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3moe")
    whole_models.write(folder, "qwen3moe")
    return folder


@pytest.fixture(scope="module")
def gguf_file(directory: Path) -> Path:
    convert(directory, directory.parent / "m.gguf", quant_method="q8_0", whole="q8_0")
    return directory.parent / "m.gguf"


@pytest.fixture
def changed(directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """The model with values of one of its JSON files replaced; its tensors are links."""

    def make(name: str = "config", **values: Any) -> Path:
        for file in directory.iterdir():
            link = tmp_path / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file)
        path = tmp_path / f"{name}.json"
        said = json.loads(path.read_text())
        path.unlink()
        path.write_text(json.dumps({**said, **values}))
        return tmp_path

    return make


# Doors
# --------------------------------------------------------------------------------------------------


def refuse(door: Callable[[Path], object], path: Path, *texts: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        door(path)
    for text in texts:
        assert text in str(refused.value)


DOORS: dict[str, Callable[[Path], object]] = {
    "describe_model": describe_model,
    "open_model": open_model,
    "load_model": load_model,
    "convert": lambda path: convert(path, path.parent / "a" / "out", quant_method="int8"),
    "convert to GGUF": lambda path: convert(path, path / "m.gguf", quant_method="q8_0"),
}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9: must be 1 to 8, the num_local_experts"),
    ({"head_dim": "x"}, "head_dim='x': must be an int"),
    ({"dtype": 5}, "dtype=5: must be one of auto, float64, float32"),
    ({"torch_dtype": "float99"}, "torch_dtype='float99': must be one of"),
    ({"num_attention_heads": 0}, "num_attention_heads=0: must be an int of 1"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4: must be a multiple of 3"),
    (
        {"rope_parameters": {"rope_type": "linear"}},
        "rope_parameters: factor=None: must be a number",
    ),
    ({"rope_parameters": {"full_attention": {"rope_theta": -1}}}, "full_attention: rope_theta=-1"),
    ({"vocab_size": -3}, "vocab_size=-3: must be an int of 1"),
    ({"pad_token_id": 384}, "pad_token_id=384: must be below 384, the vocab_size"),
    ({"architectures": 7}, "architectures=7: must be text"),
    ({"quantization_config": {"quant_method": 7}}, "quantization_config: quant_method=7"),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("values", "text"), CONTRADICTIONS, ids=lambda v: str(v)[:30])
def test_a_config_that_contradicts_itself_is_refused_at_every_door(
    values: dict[str, Any], text: str, door: str, changed: Callable[..., Path]
) -> None:
    path = changed(**values)
    refuse(DOORS[door], path, f"{path}/config.json: ", text)
    assert not (path.parent / "a").exists() and not (path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"rope_parameters": {"rope_type": "zzz"}},
            "rope_type='zzz': must be one of default, linear",
        ),
        ({"layer_types": ["x"]}, "transformers takes no such 'qwen3_moe'"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"attention_bias": "x"}, "attention_bias"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
@pytest.mark.parametrize("door", ["describe_model", "open_model", "load_model"])
def test_what_only_transformers_knows_is_refused_with_the_file(
    values: dict[str, Any], text: str, door: str, changed: Callable[..., Path]
) -> None:
    path = changed(**values)
    refuse(DOORS[door], path, f"{path}/config.json: ", text)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"eos_token_id": "x"}, "eos_token_id='x': must be an int of -1 to 2147483647, or a list"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id=[1, 'x']"),
        ({"top_p": {}}, "top_p={}: must be a number of 0 to 1"),
        ({"do_sample": True, "top_p": 0}, "top_p=0: must be above 0"),
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ({"top_k": 1.5}, "top_k=1.5: must be an int"),
        ({"do_sample": "yes"}, "do_sample='yes': must be true or false"),
    ],
)
@pytest.mark.parametrize("door", ["describe_model", "open_model", "load_model"])
def test_a_generation_config_that_cannot_be_meant_is_refused(
    values: dict[str, Any], text: str, door: str, changed: Callable[..., Path]
) -> None:
    path = changed("generation_config", **values)
    refuse(DOORS[door], path, f"{path}/generation_config.json: ", text)


@pytest.mark.parametrize("command", ["doctor", "run", "serve", "eval"])
def test_the_commands_refuse_it_in_one_line(
    command: str, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(num_experts_per_tok=9)
    more = {"run": ["hello"], "eval": ["--text", str(path / "config.json")]}.get(command, [])
    with pytest.raises(SystemExit) as ended:
        main([command, str(path), *more])
    assert ended.value.code
    said = capsys.readouterr().err
    assert "num_experts_per_tok=9: must be 1 to 8" in said and "Traceback" not in said


GGUF_DOORS: dict[str, Callable[[Path], object]] = {
    "describe_model": describe_model,
    "open_model": open_model,
    "load_gguf_model": load_gguf_model,
    "load_gguf": load_gguf,
    "convert": lambda path: convert(path, path.parent / "out", quant_method="int8"),
}


@pytest.mark.parametrize("door", GGUF_DOORS)
@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (
            "qwen3moe.expert_used_count",
            9,
            "expert_used_count=9: must be at most 8: qwen3moe.expert_count is 8",
        ),
        ("qwen3moe.attention.head_count", "four", "attention.head_count='four': must be an int"),
        ("qwen3moe.attention.head_count_kv", 3, "attention.head_count=4: must be a multiple of 3"),
        ("qwen3moe.attention.layer_norm_rms_epsilon", "small", "must be a number of 0 to 1"),
        ("qwen3moe.rope.scaling.type", 3, "rope.scaling.type=3: must be text"),
        ("qwen3moe.nextn_predict_layers", 3, "nextn_predict_layers=3: must be at most 2"),
        ("tokenizer.ggml.eos_token_id", "x", "tokenizer.ggml.eos_token_id='x': must be an int"),
        ("tokenizer.ggml.eot_token_id", [1, 2], "tokenizer.ggml.eot_token_id='a list of 2'"),
        ("ktk.eos_token_ids", ["x"], "ktk.eos_token_ids=['x']"),
    ],
)
def test_gguf_metadata_that_contradicts_itself_is_refused_at_every_door(
    key: str, value: Any, text: str, door: str, gguf_file: Path, tmp_path: Path
) -> None:
    path = rewritten(gguf_file, tmp_path / "m.gguf", lambda said, _: said.update({key: value}))
    refuse(GGUF_DOORS[door], path, str(path), text)


# Tables
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CONFIG)
def test_every_key_of_a_config_is_checked(key: str) -> None:
    config = json.loads(FAMILIES["qwen3_moe"].to_json_string(use_diff=False))
    for value in strangers(CONFIG[key]):
        said = {**copy.deepcopy(config), key: value}
        for fields in (said, {"text_config": said}):
            with pytest.raises(CheckpointError, match=rf"^here: {key}="):
                Config(fields, "here")


@pytest.mark.parametrize("key", ROPE)
def test_every_key_of_rotary_embeddings_is_checked(key: str) -> None:
    for value in strangers(ROPE[key]):
        if isinstance(value, dict):
            continue  # those of one type of layer
        for name in ("rope_parameters", "rope_scaling"):
            with pytest.raises(CheckpointError, match=f"here: {name}: {key}="):
                Config({name: {key: value}}, "here")


@pytest.mark.parametrize("key", GENERATION)
def test_every_key_of_a_generation_config_is_checked(key: str, tmp_path: Path) -> None:
    for value in strangers(GENERATION[key]):
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key}="):
            read_generation(tmp_path)


class Said(dict[str, Any]):
    """Key-values as ``checkpoint.gguf.Metadata`` gives them."""

    def size(self, key: str) -> int | None:
        return len(self[key]) if isinstance(self[key], list) else None


@pytest.mark.parametrize("key", [*GGUF, *GGUF_TOKENIZER])
def test_every_key_of_a_gguf_file_is_checked(key: str) -> None:
    rule = GGUF.get(key) or GGUF_TOKENIZER[key]
    name = f"arch.{key}" if key in GGUF else key
    for value in strangers(rule):
        with pytest.raises(CheckpointError, match=f"here: {name}="):
            check_gguf(Said({name: value}), "arch", "here")


# No false refusals
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_tests_pass(family: str) -> None:
    fields = json.loads(FAMILIES[family].to_json_string(use_diff=False))
    Config(fields, "here")
    fields.update(something_new={"x": []}, vision_config={"hidden_size": "wide"}, head_dim=None)
    Config(fields, "here")


@pytest.mark.parametrize("kind", causal_families())
def test_configs_of_every_family_of_transformers_pass(kind: str, tmp_path: Path) -> None:
    """Small ones, and the class's own default, which is the size of a real model."""
    if kind in NOT_BUILT:
        pytest.skip(NOT_BUILT[kind])
    small = small_config(kind)
    for config in (small, type(small)()):
        for use_diff in (True, False):
            (tmp_path / "config.json").write_text(config.to_json_string(use_diff=use_diff))
            check_directory(tmp_path)


def test_what_real_generation_configs_hold_passes(tmp_path: Path) -> None:
    for said in (
        {
            "bos_token_id": 128000,
            "do_sample": True,
            "eos_token_id": [128001, 128008, 128009],
            "temperature": 0.6,
            "top_p": 0.9,
        },
        {"do_sample": False, "top_k": -1, "top_p": 1, "temperature": 0, "pad_token_id": None},
        {
            "max_length": 2048,
            "repetition_penalty": 1.05,
            "transformers_version": "4.55.0",
            "cache_config": {},
        },
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
        assert read_generation(tmp_path) == said


def test_lists_of_one_value_a_layer_pass(tmp_path: Path) -> None:
    said = {
        "a.attention.head_count_kv": [8, 0, 8],
        "a.feed_forward_length": [1024, 2048],
        "a.expert_used_count": 2,
        "a.expert_count": 8,
        "tokenizer.ggml.padding_token_id": (1 << 32) - 1,  # none
    }
    check_gguf(Said(said), "a", "here")
    path = gguf_files.write_gguf(tmp_path / "m.gguf", "a", {"x": np.zeros(32, np.float32)}, {})
    assert path.exists() and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"group_size": 7}, "group_size=7"), ({"input_type": "fp8"}, "input_type='fp8'")],
)
def test_a_refused_conversion_leaves_no_folder(
    options: dict[str, Any], text: str, directory: Path, gguf_file: Path, tmp_path: Path
) -> None:
    for source in (directory, gguf_file):
        with pytest.raises(ValueError, match=text):
            convert(source, tmp_path / "a" / "out", quant_method="int4", **options)
        assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=text):
        convert(directory, tmp_path / "a" / "out", quant_method="int4", **options)
    assert (tmp_path / "a").exists()
