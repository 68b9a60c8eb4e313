"""Tokenizers of GGUF files: as the Hugging Face ones they were written from, and as llama.cpp,
where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.convert.sinks.gguf_tokenizer import tokenizer_metadata
from ktk.demo.smollm2 import find_gguf
from ktk.errors import CheckpointError
from ktk.integration.transformers.gguf import load_gguf_tokenizer
from ktk.models.arch import PRE_TOKENIZERS
from make import gguf_files

# What pre-tokenizers differ in: runs of space, digits, case, contractions, scripts, marks,
# punctuation.
HARD = (
    "Hello  world\n\n\tcafé ÀÉÎ naïve ÑANDÚ ǅenan",
    "你好世界，今天天气很好。これはテストです。カタカナ 한국어 텍스트",
    "🎉👩‍👩‍👧 emoji ☃",
    "1234567 x=3.14 0001 ½ ² Ⅷ ٣٤",
    "don't DON'T we'LL I'd 'tis",
    "   lead  and trail   ",
    "\r\n \r\n\n   x\n\t\ty",
    "a_b-c/d\\e {x:[1,2]} <|im_start|>user\nhi<|im_end|>",
    'for i in range(10):\n    print(f"{i:>3}")  # done!!!\n',
    "Привет мир ЭТО ТЕСТ Ελληνικά العربية עברית हिन्दी ไทย հայերեն ქართული",
    "camelCase HTTPServer XMLHttp ABCdef",
    "$100 100% +5 a+b==c ~x^2|y` ",
    "\u00a0nbsp \u3000ideographic \u200bzw",
    "end with newline\n\n",
)
TOKENS = 6000
MODEL = {  # what llama.cpp wants to see of a model before it looks at the vocabulary
    "llama.context_length": 512,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Any]:
    """The tokenizer's metadata of a real model, the first 6,000 tokens of its byte-level BPE."""
    try:
        metadata = GgufCheckpoint.open(find_gguf()).metadata
    except CheckpointError as error:
        pytest.skip(str(error))
    found = {key: metadata[key] for key in metadata if key.startswith("tokenizer.")}
    for key in ("tokens", "token_type"):
        found[f"tokenizer.ggml.{key}"] = found[f"tokenizer.ggml.{key}"][:TOKENS]
    tokens = set(found["tokenizer.ggml.tokens"])
    merges = found["tokenizer.ggml.merges"]
    found["tokenizer.ggml.merges"] = [
        m for m in merges if {*m.split(), m.replace(" ", "")} <= tokens
    ]
    return found


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    """A SentencePiece vocabulary in small: bytes, and pieces with scores.

    Emoji and snowman are no pieces.
    """
    trained = Tokenizer(models.BPE())
    words = " ".join(HARD).replace(" ", "▁").replace("☃", "").replace("🎉", "")
    trainer = trainers.BpeTrainer(vocab_size=700, max_token_length=6, show_progress=False)
    trained.train_from_iterator([words] * 2, trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3, *([6] * 256), *([1] * len(pieces))]
    scores = [0.0] * len(tokens)
    for rank, (piece, _) in enumerate(pieces):
        tokens.append(piece)
        scores.append(-float(rank) if len(piece) > 1 else -1e6)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write(path: Path, metadata: dict[str, Any]) -> Path:
    count = len(metadata["tokenizer.ggml.tokens"])
    everything = {**MODEL, "llama.vocab_size": count, **metadata}
    return gguf_files.write_gguf(path, "llama", {"x": np.zeros(32, np.float32)}, everything)


def compare_with_llama_cpp(path: Path, tokenizer: Any) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in (*HARD, " ".join(HARD), " "):
        wanted = theirs.tokenize(text.encode(), add_bos=True, special=True)
        got = tokenizer(text)["input_ids"]
        assert got == wanted, (
            text,
            tokenizer.convert_ids_to_tokens(got),
            tokenizer.convert_ids_to_tokens(wanted),
        )


@pytest.mark.parametrize("row", PRE_TOKENIZERS, ids=lambda row: row.names[0])
def test_every_pre_tokenizer_cuts_as_llama_cpp(
    row: Any, smollm2: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "t.gguf", {**smollm2, "tokenizer.ggml.pre": row.names[0]})
    tokenizer = load_gguf_tokenizer(path)
    for text in HARD:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    compare_with_llama_cpp(path, tokenizer)


def test_pre_tokenizers_differ_where_they_should(smollm2: dict[str, Any], tmp_path: Path) -> None:
    """The texts above tell every two expressions apart: a wrong row of the table would be seen."""
    seen: dict[str, str] = {}
    for row in PRE_TOKENIZERS:
        path = write(tmp_path / "t.gguf", {**smollm2, "tokenizer.ggml.pre": row.names[0]})
        backend = load_gguf_tokenizer(path).backend_tokenizer
        cut = str([backend.pre_tokenizer.pre_tokenize_str(text) for text in HARD])
        assert seen.setdefault(cut, str(row.splits)) == str(row.splits), row.names
    assert len(seen) == len({row.splits for row in PRE_TOKENIZERS})


def test_a_real_tokenizer_is_the_one_transformers_reads(tmp_path: Path) -> None:
    try:
        path = find_gguf()
    except CheckpointError as error:
        pytest.skip(str(error))
    ours = load_gguf_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # As the model's tokenizer.json has it; transformers reads GGUF files without the rule for
    # digits.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in (*HARD, " ".join(HARD)):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    turn = [{"role": "user", "content": "Hello"}]
    kwargs = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(turn, **kwargs) == theirs.apply_chat_template(turn, **kwargs)
    assert ours.special_tokens_map == theirs.special_tokens_map


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_as_llama_cpp(
    prefix: bool | None, sentencepiece: dict[str, Any], tmp_path: Path
) -> None:
    metadata = dict(sentencepiece)
    if prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = prefix
    path = write(tmp_path / "t.gguf", metadata)
    tokenizer = load_gguf_tokenizer(path)
    for text in (*HARD, " "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert "<0xE2>" in tokenizer.convert_ids_to_tokens(tokenizer("☃")["input_ids"])
    compare_with_llama_cpp(path, tokenizer)


def test_special_tokens_and_templates_come_from_the_metadata(
    smollm2: dict[str, Any], tmp_path: Path
) -> None:
    types = list(smollm2["tokenizer.ggml.token_type"])
    types[1000] = 4
    metadata = {
        **smollm2,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template.tool_use": "tools",
    }
    del metadata["tokenizer.ggml.padding_token_id"]
    tokenizer = load_gguf_tokenizer(write(tmp_path / "t.gguf", metadata))
    assert tokenizer("a")["input_ids"][0] == 0 and tokenizer("a")["input_ids"][-1] == 2
    assert tokenizer.model_max_length == 512
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == {
        "tool_use": "tools",
        "default": smollm2["tokenizer.chat_template"],
    }
    user_defined = smollm2["tokenizer.ggml.tokens"][1000]
    assert tokenizer("x" + user_defined + "y", add_special_tokens=False)["input_ids"][1] == 1000
    ids = tokenizer("<|im_start|>")["input_ids"]
    assert ids == [0, 1, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("model", "rwkv", "'rwkv': ktk reads gpt2, llama"),
        ("pre", "brandnew", "'brandnew': ktk knows bailing|'brandnew': ktk knows chatglm-bpe"),
        ("merges", ["ab"], "holds 'ab': must be two tokens"),
        ("merges", ["qqq zzz"], "do not fit the tokens"),
        ("token_type", [1, 1], "has 2 entries, tokens 6000"),
        ("tokens", ["a", "b", "a"], "holds 'a' twice"),
        ("tokens", "text", "must be a list"),
        ("add_bos_token", 1, "must be of type bool"),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_named(
    key: str, value: Any, text: str, smollm2: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "t.gguf", {**smollm2, f"tokenizer.ggml.{key}": value})
    with pytest.raises(CheckpointError, match=text):
        load_gguf_tokenizer(path)


# From tokenizer.json to a file and back
# ----------------------------------------------------------------------------


def round_trip(tokenizer: Any, folder: Path, vocab_size: int) -> Any:
    tokenizer.save_pretrained(folder)
    return load_gguf_tokenizer(write(folder / "t.gguf", tokenizer_metadata(folder, vocab_size)))


@pytest.mark.parametrize("row", PRE_TOKENIZERS, ids=lambda row: row.names[0])
def test_a_tokenizer_json_goes_into_a_file_and_back(
    row: Any, smollm2: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "t.gguf", {**smollm2, "tokenizer.ggml.pre": row.names[0]})
    given = load_gguf_tokenizer(path)
    back = round_trip(given, tmp_path / "hf", TOKENS + 8)
    for text in HARD:
        assert back(text)["input_ids"] == given(text)["input_ids"]
    assert back.chat_template == given.chat_template
    assert back.special_tokens_map["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_json_goes_into_a_file_and_back(
    prefix: bool, sentencepiece: dict[str, Any], tmp_path: Path
) -> None:
    metadata = {**sentencepiece, "tokenizer.ggml.add_space_prefix": prefix}
    given = load_gguf_tokenizer(write(tmp_path / "t.gguf", metadata))
    back = round_trip(given, tmp_path / "hf", len(metadata["tokenizer.ggml.tokens"]))
    for text in HARD:
        assert back(text)["input_ids"] == given(text)["input_ids"]
    compare_with_llama_cpp(tmp_path / "hf" / "t.gguf", given)


def _with(change: Callable[[Tokenizer], object]) -> Any:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    change(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    def odd(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("ab", "isolated")

    with pytest.raises(CheckpointError, match="has no GGUF name for that"):
        round_trip(_with(odd), tmp_path / "odd", 3)
    beyond = _with(lambda t: t.add_tokens([AddedToken("c")]))
    with pytest.raises(CheckpointError, match="'c' has id 3: the embedding has 3 rows"):
        round_trip(beyond, tmp_path / "beyond", 3)
