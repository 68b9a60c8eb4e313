"""What a model is trained on: the lines of a JSON Lines file as tokens, and which of them count.

A line is an object with "messages" (a conversation: the assistant's tokens count), with "prompt"
and "completion" (the completion's count) or with "text" (all count). Its bytes are taken as
hostile: what does not fit is a DataError that names the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ktk.integration.transformers.tokens import encode, encode_chat
from ktk.paths import user_path

FORMS = 'must have "messages", or "prompt" and "completion", or "text"'
MOST_BYTES = 1 << 26  # of a line: more is no example but a file of another kind


class DataError(ValueError):
    """A training file, or one of its lines, that cannot be used."""


@dataclass(frozen=True)
class Example:
    """One sequence of tokens.

    ids : of the tokens. is_target : of each, whether the loss counts how it is predicted.
    """

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted; nothing comes before the first, so it is none."""
        return sum(self.is_target[1:])


def read_examples(path: str | os.PathLike[str], tokenizer: Any, context: int) -> list[Example]:
    """The examples of a file, in its order.

    A longer text is cut into sequences of ``context`` tokens, a longer conversation or completion
    after ``context``. A conversation whose template changes earlier answers, as some do with
    reasoning, becomes several examples.
    Raises DataError with the number of the line, OSError.
    """
    if context < 2:
        raise ValueError(f"context={context}: must be at least 2 tokens")
    examples: list[Example] = []
    for number, line in _lines(path):
        try:
            examples += _of_line(line, tokenizer, context)
        except (ValueError, TypeError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(f"{path}: line {number}: {said}") from error
    if not examples:
        raise DataError(f"{path}: has no examples: each line {FORMS}")
    return examples


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line that is not blank."""
    with open(user_path(path), "rb") as file:
        number = 0
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise DataError(f"{path}: line {number}: is longer than {MOST_BYTES} bytes")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # some editors' mark of UTF-8
            if line.strip():
                yield number, line


def _of_line(line: bytes, tokenizer: Any, context: int) -> list[Example]:
    try:
        said = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(said, dict):
        raise ValueError(f"is a JSON {type(said).__name__}: must be an object that {FORMS[5:]}")
    if "messages" in said:
        return _conversation(_messages(said["messages"]), tokenizer, context)
    if "prompt" in said and "completion" in said:
        prompt, completion = (_string(said, name) for name in ("prompt", "completion"))
        before = encode(tokenizer, prompt)
        after = [*encode(tokenizer, completion, is_whole=False), *_end(tokenizer)]
        return [_cut(before + after, [False] * len(before) + [True] * len(after), context)]
    if "text" in said:
        ids = [*encode(tokenizer, _string(said, "text")), *_end(tokenizer)]
        return _pieces(ids, context)
    raise ValueError(f"has {sorted(said)[:6]}: {FORMS}")


def _string(said: dict[str, Any], name: str) -> str:
    value = said[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is a {type(value).__name__}: must be a string")
    return value


def _messages(said: Any) -> list[dict[str, str]]:
    if not isinstance(said, list) or not said:
        raise ValueError("'messages' must be a list of messages")
    found = []
    for at, message in enumerate(said):
        if not isinstance(message, dict):
            raise ValueError(f"message {at} is a {type(message).__name__}: must be an object")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(f"message {at}: {name!r} must be a string")
        found.append({"role": message["role"], "content": message["content"]})
    if all(message["role"] != "assistant" for message in found):
        raise ValueError("no message is the assistant's: there is nothing to learn")
    return found


def _end(tokenizer: Any) -> list[int]:
    """What tells a model that a text is over, if it has such a token."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _pieces(ids: list[int], context: int) -> list[Example]:
    """A text in sequences; a last token alone is left out."""
    if len(ids) < 2:
        raise ValueError("the text has fewer than two tokens: there is nothing to predict")
    parts = [tuple(ids[at : at + context]) for at in range(0, len(ids), context)]
    return [Example(part, (True,) * len(part)) for part in parts if len(part) > 1]


def _cut(ids: Sequence[int], is_target: Sequence[bool], context: int) -> Example:
    """ValueError if nothing is left to predict."""
    example = Example(tuple(ids[:context]), tuple(is_target[:context]))
    if example.num_targets:
        return example
    if any(is_target[1:]):
        raise ValueError(
            f"its first {context} tokens are all prompt: a longer --context has room for the answer"
        )
    raise ValueError("has no token to predict")


def _conversation(messages: list[dict[str, str]], tokenizer: Any, context: int) -> list[Example]:
    """One example whose answers are all targets; further ones for answers that the whole
    conversation renders otherwise.
    """
    if not tokenizer.chat_template:
        raise ValueError("'messages' need a chat template, which this model's tokenizer has not")
    whole = encode_chat(tokenizer, messages, is_asked=False)
    is_target = [False] * len(whole)
    apart = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = encode_chat(tokenizer, messages[:at]) if at else []
        answered = encode_chat(tokenizer, messages[: at + 1], is_asked=False)
        if answered[: len(asked)] != asked:
            raise ValueError(
                f"message {at}: the chat template writes an answer otherwise than it asks for one"
            )
        own = [False] * len(asked) + [True] * (len(answered) - len(asked))
        if whole[: len(answered)] == answered:
            is_target[len(asked) : len(answered)] = own[len(asked) :]
        else:
            apart.append((answered, own))
    found = [(whole, is_target)] if any(is_target) else []
    return [_cut(ids, own, context) for ids, own in (*apart, *found)]
