"""What a model's tokenizer and its own settings say of tokens: texts as tokens and back,
which of them end a text, how they are chosen.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from ktk.errors import CheckpointError


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Of a model's directory. Raises CheckpointError if there is none, or it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever the files make of it
        raise CheckpointError(
            f"{path}: its tokenizer cannot be read: {type(error).__name__}: {error}"
        ) from error
    # Of a directory without one, transformers makes a tokenizer with no more than special tokens.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise CheckpointError(f"{path}: has no tokenizer: copy its tokenizer.json there")
    return tokenizer


def encode(tokenizer: Any, text: str, is_whole: bool = True) -> list[int]:
    """A text's tokens. is_whole : with those the tokenizer puts around it. Raises ValueError if it
    is not Unicode.
    """
    _check_unicode(text)
    options = {} if is_whole else {"add_special_tokens": False}
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def encode_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    is_asked: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """The tokens of a conversation up to where the answer begins, if it is asked for one.

    tools : those that the answer may call, as OpenAI's API has them.

    Raises ValueError if the template refuses the messages, or one is not Unicode.
    """
    from jinja2 import TemplateError

    for message in messages:
        _check_unicode(message["content"])

    def encoded(given: Sequence[dict[str, Any]]) -> list[int]:
        made = tokenizer.apply_chat_template(
            list(given), tools=tools, add_generation_prompt=is_asked
        )
        ids: list[int] = made["input_ids"]
        return ids

    try:
        try:
            return encoded(messages)
        except TypeError:  # DeepSeek's put calls' arguments between texts as they are
            return encoded([_with_texts(message) for message in messages])
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        own = call["function"]
        arguments = json.dumps(own["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**own, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _check_unicode(text: str) -> None:
    """Tokenizers take no halves of surrogate pairs: JSON's "\\ud800" is one,
    and a byte of a command line that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair, \\u{ord(text[error.start]):04x}, at "
            f"character {error.start}: it must be whole Unicode characters"
        ) from error


def decode(tokenizer: Any, ids: list[int], keeps_special: bool = False) -> str:
    """The text of tokens, special ones left out unless they are kept."""
    text: str = tokenizer.decode(ids, skip_special_tokens=not keeps_special)
    return text


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text: those of the generation config, and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {int(t) for t in (*listed, tokenizer.eos_token_id) if t is not None and t >= 0}


def added_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> text of the tokens that were added to the vocabulary, special ones among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {index: str(token) for index, token in added.items()}


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that texts leave out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token): index for index, token in added.items() if token.special}


def vocabulary_size(model: Any) -> int:
    """How many tokens a model knows."""
    return int(model.get_input_embeddings().num_embeddings)


def own_sampling(config: Any) -> tuple[bool, dict[str, float]]:
    """Whether a model's own settings, its generation_config, sample; and those of temperature,
    top_p and top_k that they give.
    """
    given = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k")}
    found = {name: value for name, value in given.items() if value is not None}
    return bool(getattr(config, "do_sample", False)), found


class Spelling:
    """The bytes that each token stands for.

    One after another they are those of the text, as far as it has all tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = added_tokens(tokenizer)
        self._decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = _kinds(json.loads(self._decoder.__getstate__())) if self._decoder else set()
        self._has_bytes = "ByteFallback" in kinds
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else {}

    def bytes_of(self, token: int, is_first: bool) -> bytes:
        """is_first : whether a text begins with it,
        where some tokenizers leave out the space that a word begins with.
        """
        if self._decoder is None:
            text: str = self._tokenizer.decode([token])
            return text.encode()
        spelled = self._added.get(token) or self._tokenizer.convert_ids_to_tokens(token)
        if spelled is None:  # models have more rows than tokens
            return b""
        if self._has_bytes and (byte := _BYTE.fullmatch(spelled)):
            return bytes.fromhex(byte[1])
        if self._alphabet:
            letters = {} if token in self._added else self._alphabet
            return b"".join(letters.get(c) or c.encode() for c in spelled)
        if is_first:
            return self._decoder.decode([spelled]).encode()
        after = self._decoder.decode([_LETTER, spelled])
        return after.removeprefix(self._decoder.decode([_LETTER])).encode()


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's, where no token has a character
_LETTER = "a"


def _kinds(decoder: dict[str, Any]) -> set[str]:
    """The types of a decoder of the tokenizers library and of those it is made of."""
    inner = (_kinds(one) for one in decoder.get("decoders", ()))
    return {decoder["type"]}.union(*inner)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's letters for bytes: printable ones of Latin-1 stand for themselves,
    the others follow from 256 on, in order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(own))
    letters = {byte: chr(byte) for byte in own}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {letter: bytes([byte]) for byte, letter in letters.items()}
