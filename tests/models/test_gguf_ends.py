"""What ends an answer of a GGUF model: written from a directory, read as llama.cpp reads it,
and how tokens are typed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.convert.run import convert
from ktk.convert.sinks.gguf_tokenizer import tokenizer_metadata
from ktk.generate.open import open_model
from ktk.generate.sampling import Sampling
from ktk.generate.session import Session
from ktk.integration.transformers.gguf_tokenizer import gguf_ends, load_gguf_tokenizer
from ktk.integration.transformers.tokens import end_tokens
from ktk.models.whole.ends import end_ids, end_keys
from make import gguf_files, whole_models

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
GREETING = [5, 6, 7]

runs = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3moe")
    whole_models.write(folder, "qwen3moe")
    return folder


def with_ends(directory: Path, folder: Path, ends: Any, where: str = "generation_config") -> Path:
    """A copy of the model whose generation_config.json, or config.json, says what ends a text."""
    shutil.copytree(directory, folder)
    path = folder / f"{where}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    if where == "config":
        (folder / "generation_config.json").unlink()
    return folder


def vocabulary(path: Path, tokens: list[str], types: list[int], **named: int) -> Path:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{role}_token_id": index for role, index in named.items()},
    }
    return gguf_files.write_gguf(path, "llama", {"x": np.zeros(32, np.float32)}, metadata)


@runs
@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_three_ends_of_a_directory_all_end_a_text_of_its_file(
    where: str, directory: Path, tmp_path: Path
) -> None:
    ends = [2, 300, 301]  # <|im_end|>, which the tokenizer calls eos, and two words
    folder = with_ends(directory, tmp_path / "hf", ends, where)
    file = tmp_path / "m.gguf"
    convert(folder, file, quant_method="f32", whole="f32")
    metadata = GgufCheckpoint.open(file).metadata
    named = {role: metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")}
    assert named == {"eos": 2, "eot": 300, "eom": 301}
    types = metadata["tokenizer.ggml.token_type"]
    assert [types[i] for i in (0, 1, *ends)] == [CONTROL] * 5
    assert types[303] == NORMAL
    opened = open_model(file, linear="none")
    assert end_tokens(opened.model, opened.tokenizer) == {0, *ends}  # <|endoftext|> by its text
    for end in ends:
        hook = opened.model.lm_head.register_forward_hook(
            lambda module, given, logits, end=end: logits + 1e6 * (torch.arange(384) == end)
        )
        made = Session(opened.model, opened.tokenizer).generate(GREETING, Sampling(), max_tokens=4)
        hook.remove()
        assert (made.finish_reason, made.text) == ("stop", "")


def test_more_ends_than_a_file_has_roles_are_kept_for_ktk(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = [2, 300, 301, 302, 0]
    folder = with_ends(directory, tmp_path / "hf", ends)
    metadata = tokenizer_metadata(folder, whole_models.VOCAB)
    assert metadata["ktk.eos_token_ids"] == [302]
    assert "name three such tokens" in caplog.text
    tokens, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert sorted(end_ids(metadata, tokens, types)) == sorted(ends)


def test_a_directory_without_ends_keeps_the_tokenizers(directory: Path, tmp_path: Path) -> None:
    metadata = tokenizer_metadata(with_ends(directory, tmp_path / "hf", None), whole_models.VOCAB)
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.eot_token_id" not in metadata and "ktk.eos_token_ids" not in metadata


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|return|>",
        "[EOT]",
        "<|end_of_text|>",
    ],
)
def test_the_end_of_a_turn_is_known_by_its_text_whatever_its_type(
    text: str, kind: int, tmp_path: Path
) -> None:
    path = vocabulary(
        tmp_path / "m.gguf", ["a", "b", "ab", "</s>x", text], [1, 1, 1, 1, kind], eos=3
    )
    assert gguf_ends(GgufCheckpoint.open(path)) == [3, 4]
    tokenizer = load_gguf_tokenizer(path)
    ids = tokenizer(f"ab{text}a", add_special_tokens=False)["input_ids"]
    assert ids == [2, 4, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "aba"


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),  # gpt-oss
        (["<|end|>", "<|flush|>", "<|calls|>"], ["<|flush|>", "<|calls|>"]),  # Solar
        (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
        (["<|end|>", "<|endoftext|>"], ["<|end|>", "<|endoftext|>"]),  # Phi
        (["</s>", "<|tool_response>", "<turn|>"], ["<|tool_response>", "<turn|>"]),  # Gemma 4
    ],
)
def test_exceptions_are_those_of_llama_cpp(tokens: list[str], ends: list[str]) -> None:
    for kind in (NORMAL, CONTROL):
        assert [tokens[i] for i in end_ids({}, tokens, [kind] * len(tokens))] == ends
    named = {"tokenizer.ggml.eos_token_id": 0}  # an exception holds for a named token too
    assert sorted(tokens[i] for i in end_ids(named, tokens)) == sorted(ends)


def test_glm_ends_at_the_next_speaker_only_where_it_is_a_control_token() -> None:
    tokens = ["<|endoftext|>", "<|user|>", "<|observation|>"]
    assert end_ids({}, tokens, [CONTROL] * 3) == [0, 1, 2]
    assert end_ids({}, tokens, [CONTROL, NORMAL, USER_DEFINED]) == [0]
    keys, unsaid = end_keys([0, 1, 2], 0, tokens)
    assert not unsaid and set(keys.values()) == {0, 1, 2}


def test_the_end_of_a_message_gets_its_own_role() -> None:
    tokens = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]  # Llama 3
    keys, unsaid = end_keys([0, 1, 2], 2, tokens)
    assert not unsaid
    assert keys == {
        f"tokenizer.ggml.{role}_token_id": i for role, i in (("eos", 2), ("eom", 1), ("eot", 0))
    }


def test_special_tokens_are_typed_control_and_added_words_user_defined(tmp_path: Path) -> None:
    tokenizer = whole_models.tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    described = json.loads(path.read_text())
    for added in described["added_tokens"]:
        added["special"] = False  # tokenizer_config.json says it nevertheless
    path.write_text(json.dumps(described))
    metadata = tokenizer_metadata(tmp_path, whole_models.VOCAB)
    types = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    )
    assert types["<think>"] == USER_DEFINED
    assert {types[text] for text in (*whole_models.SPECIAL, "<|tool|>")} == {CONTROL}
    assert UNKNOWN not in types.values()
