"""Which tokens end an answer, in a GGUF file's metadata: read as llama.cpp decides it, and written
so that it decides the same.

Source: what llama.cpp's vocabulary makes of eos, eot and eom ids and of tokens' texts; its
exceptions for gpt-oss, Solar and Gemma 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("eos", "eot", "eom")  # tokenizer.ggml.{role}_token_id
OWN_KEY = "ktk.eos_token_ids"  # a list of what the three roles cannot say
CONTROL = 3  # of tokenizer.ggml.token_type
# Whatever the token's type: files of chat models often name only the end of a text, and type the
# end of a turn as any word.
TEXTS = frozenset(
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "</s>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
    ]
)
# Only of type control: GLM's turns begin with them, older files name neither.
CONTROL_TEXTS = frozenset(("<|user|>", "<|observation|>"))
# Where all of the first are in a vocabulary, the second does not end an answer: <|end|> ends a
# message, after which it goes on.
EXCEPTIONS = (
    (("<|return|>", "<|call|>"), "<|end|>"),
    (("<|calls|>", "<|flush|>"), "<|end|>"),
    (("<|call|>", "<|flush|>"), "<|end|>"),
    (("<|tool_response>",), "</s>"),
)


def end_ids(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int] | None = None
) -> list[int]:
    """Ids of the tokens that end an answer, those that the metadata names first."""
    by_text = _ends_by_text(tokens, types)
    present = {tokens[i] for i in by_text}
    removed = {text for needed, text in EXCEPTIONS if present.issuperset(needed)}
    named = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ROLES]
    found = [i for i in (*named, *by_text) if i is not None and i >= 0]
    ends = [i for i in found if i >= len(tokens) or tokens[i] not in removed]
    return list(dict.fromkeys([*ends, *metadata.get(OWN_KEY, ())]))


def _ends_by_text(tokens: Sequence[str], types: Sequence[int] | None) -> list[int]:
    """Exceptions included."""
    found = []
    for index, token in enumerate(tokens):
        is_control = types is not None and types[index] == CONTROL
        if token in TEXTS or (is_control and token in CONTROL_TEXTS):
            found.append(index)
    return found


def end_keys(
    ends: Sequence[int], eos: int | None, tokens: Sequence[str]
) -> tuple[dict[str, Any], list[int]]:
    """Key-values that make all of ``ends`` end an answer, and those of them that only ktk reads.

    eos : the tokenizer's, whose key is written anyway. Roles go first to tokens that no text gives
        away.
    """
    roles = {} if eos is None else {"eos": eos}
    by_text = end_ids({}, tokens)
    for index in sorted((i for i in ends if i != eos), key=by_text.__contains__):
        free = [role for role in ROLES if role not in roles]
        if free:
            is_message = tokens[index] == "<|eom_id|>" and "eom" in free
            roles["eom" if is_message else free[0]] = index
    keys: dict[str, Any] = {f"tokenizer.ggml.{role}_token_id": i for role, i in roles.items()}
    unsaid = [i for i in ends if i not in end_ids(keys, tokens)]
    if unsaid:
        keys[OWN_KEY] = unsaid
    return keys, unsaid
