"""A directory's tokenizer as the key-values of a GGUF file; the plug-in reads them back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ktk.checkpoint.safetensors import read_json_object
from ktk.errors import CheckpointError
from ktk.log import logger
from ktk.models import check_directory
from ktk.models.arch import PRE_TOKENIZERS
from ktk.models.metadata import read_generation
from ktk.models.whole.ends import end_keys

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """``tokenizer.*`` of a directory's tokenizer.json, tokenizer_config.json and templates.

    vocab_size : rows of the embedding; tokens beyond the tokenizer's are filled up. Raises
    CheckpointError for what GGUF cannot say.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no tokenizer.json: a whole GGUF file needs it; "
            "leave --whole out for the experts alone"
        )
    described = read_json_object(path)
    config = directory / "tokenizer_config.json"
    settings = read_json_object(config) if config.is_file() else {}
    model = described.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{path}: the model is {model.get('type')!r}: must be BPE")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    is_bytes = not model.get("byte_fallback")

    def put(token: str, index: int, kind: int) -> None:
        if not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{path}: token {token!r} has id {index}: the embedding has {vocab_size} rows"
            )
        tokens[index], types[index] = token, kind

    for token, index in model["vocab"].items():
        put(token, index, BYTE if not is_bytes and BYTE_TOKEN.fullmatch(token) else NORMAL)
    for added in described.get("added_tokens", ()):
        put(added["content"], added["id"], CONTROL if added.get("special") else USER_DEFINED)
    ids = {token: index for index, token in enumerate(tokens)}
    ends = _end_ids(directory, vocab_size)
    special = {ids[text] for text in _special_texts(settings) if text in ids}
    for index in special.union(ends):
        types[index] = CONTROL
    if not is_bytes and model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    found: dict[str, Any] = {"tokenizer.ggml.model": "gpt2" if is_bytes else "llama"}
    if is_bytes:
        found["tokenizer.ggml.pre"] = _pre_name(path, described.get("pre_tokenizer"))
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    else:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        scores = [-float(ranks.get(token, len(merges))) for token in tokens]
        found["tokenizer.ggml.scores"] = scores
        normalizer = json.dumps(described.get("normalizer")) + json.dumps(
            described.get("pre_tokenizer")
        )
        found["tokenizer.ggml.add_space_prefix"] = (
            '"Prepend"' in normalizer
            or '"prepend_scheme": "' in normalizer.replace('"prepend_scheme": "never"', "")
        )
    found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"] = tokens, types
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _text_of(settings.get(f"{name}_token"))
        if token in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    keys, unsaid = end_keys(ends, found.get("tokenizer.ggml.eos_token_id"), tokens)
    found.update(keys)
    if unsaid:
        logger.warning(
            "%s: %s end an answer: a GGUF file can name three such tokens, "
            "so only ktk will end there",
            directory,
            ", ".join(repr(tokens[i]) for i in unsaid),
        )
    found["tokenizer.ggml.add_bos_token"] = _begins_with(described, settings.get("bos_token"))
    template = directory / "chat_template.jinja"
    text = (
        template.read_text(encoding="utf-8")
        if template.is_file()
        else settings.get("chat_template")
    )
    if isinstance(text, str):
        found["tokenizer.chat_template"] = text
    return found


def _text_of(token: Any) -> str | None:
    """A token's text, as tokenizer_config.json has it in either of two forms."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_texts(settings: dict[str, Any]) -> set[str]:
    """Tokens that tokenizer_config.json calls special, which tokenizer.json need not repeat."""
    found = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or ()
        found += more.values() if isinstance(more, dict) else more
    decoder = settings.get("added_tokens_decoder") or {}
    found += [token for token in decoder.values() if token.get("special")]
    return {text for token in found if (text := _text_of(token)) is not None}


def _end_ids(directory: Path, vocab_size: int) -> list[int]:
    """What ends an answer: generation_config.json's list, else config.json's."""
    given = read_generation(directory).get("eos_token_id")
    if given in (None, []) and (directory / "config.json").is_file():
        given = check_directory(directory).get("eos_token_id")
    ends = given if isinstance(given, list) else [given]
    return [i for i in ends if i is not None and 0 <= i < vocab_size]


def _begins_with(described: dict[str, Any], bos: Any) -> bool:
    """Whether the post-processor puts the bos token before a text."""
    token = _text_of(bos)
    return token is not None and json.dumps(token) in json.dumps(described.get("post_processor"))


def _pre_name(path: Path, described: Any) -> str:
    """``tokenizer.ggml.pre`` of a tokenizer.json's pre_tokenizer; CheckpointError if not known."""
    steps = (described or {}).get("pretokenizers", [described])
    patterns = []
    for step in steps:
        kind = (step or {}).get("type")
        if kind == "Split":
            pattern = step["pattern"]
            patterns.append(pattern.get("Regex") or re.escape(pattern.get("String", "")))
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and step.get("use_regex", True):
            patterns.append(_gpt2())
        elif kind != "ByteLevel":
            raise CheckpointError(f"{path}: pre_tokenizer {kind!r}: ktk has no GGUF name for it")
    for row in PRE_TOKENIZERS:
        if list(row.splits) == patterns:
            return row.names[0]
    raise CheckpointError(
        f"{path}: its pre_tokenizer cuts by {patterns}: ktk has no GGUF name for that"
    )


def _gpt2() -> str:
    """The expression that ByteLevel has built in."""
    return next(row for row in PRE_TOKENIZERS if "gpt-2" in row.names).splits[0]
