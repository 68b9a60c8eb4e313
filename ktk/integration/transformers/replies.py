"""What chat models write beside an answer's text: reasoning, and calls of tools.

A model's tokenizer may say how (its ``response_template``); of others the chat template tells, by
marks that ``FORMATS`` knows. transformers' own parser reads the text as it comes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ktk.integration.transformers.names import ResponseParser
from ktk.integration.transformers.tokens import special_tokens

THINK = {"open": "<think>", "close": "</think>"}
# Where the parser should begin in a prompt; ours are given what the prompt left open, no more.
_NOWHERE = "\0"
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_CALL = {"type": "function", "function": "{content}"}


@dataclass(frozen=True)
class Format:
    """mark : in the chat template. fields : as transformers' response templates have them.

    begin, end : around a call's JSON, where a grammar can force it (is_forced). name_key,
    arguments_key : in it.
    is_list : begin and end are around a list of calls.
    """

    mark: str
    fields: dict[str, Any]
    begin: str = ""
    end: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"
    is_list: bool = False
    is_forced: bool = True


def _calls(opens: str, content: str = "json", **more: Any) -> dict[str, Any]:
    return {"tool_calls": {"open_pattern": opens, "content": content, "repeats": True, **more}}


_TEXT = {"content": {"content": "text"}}
_THINKING = {"reasoning_content": {**THINK, "content": "text"}}
# The first whose mark a template has.
FORMATS = {
    "harmony": Format(
        "<|channel|>",
        {
            "reasoning_content": {
                "open": "<|channel|>analysis<|message|>",
                "close": "<|end|>",
                "content": "text",
            },
            **_calls(
                r"(?:<\|channel\|>\w+ to=functions\.(?P<name>[\w.-]+)"
                r"| to=functions\.(?P<name>[\w.-]+)<\|channel\|>\w+)"
                r"\s*(?:<\|constrain\|>)?\s*(?:json|code)?<\|message\|>",
                close="<|call|>",
                transform=_NAMED,
            ),
            "content": {
                "open_pattern": r"<\|channel\|>(?:final|commentary)<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
                "content": "text",
            },
        },
        is_forced=False,
    ),
    "xml": Format(
        "<function=",
        {
            **_calls(
                r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "xml-inline",
                close_pattern=r"</function>\s*</tool_call>",
                content_args={
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
                },
                transform=_NAMED,
            ),
            **_TEXT,
        },
        is_forced=False,
    ),
    "hermes": Format(
        "<tool_call>",
        {**_calls(r"\s*<tool_call>", close="</tool_call>", transform=_CALL), **_TEXT},
        "<tool_call>\n",
        "\n</tool_call>",
    ),
    "mistral with [ARGS]": Format(
        "[ARGS]",
        {
            **_calls(
                r"\[TOOL_CALLS\](?P<name>[\w.-]+)\[ARGS\]",
                close_pattern=r"(?=\[TOOL_CALLS\])",
                transform=_NAMED,
            ),
            **_TEXT,
        },
        is_forced=False,
    ),
    "mistral": Format(
        "[TOOL_CALLS]",
        {
            **_calls(
                r"\[TOOL_CALLS\]",
                transform={
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{arguments}"},
                },
                transform_each=True,
            ),
            **_TEXT,
        },
        "[TOOL_CALLS]",
        is_list=True,
    ),
    "llama": Format(
        "<|python_tag|>",
        {
            **_calls(
                r'(?:<\|python_tag\|>)?(?=\{\s*"name")',
                transform={
                    "type": "function",
                    "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
                },
            ),
            **_TEXT,
        },
        arguments_key="parameters",
    ),
}


class ReplyStyle:
    """Of one model. has_tools : whether its chat template shows tools to it."""

    def __init__(self, tokenizer: Any) -> None:
        templates = getattr(tokenizer, "chat_template", None) or ""
        texts = templates.values() if isinstance(templates, dict) else [templates]
        template = "\n".join(texts)
        self.has_tools = "tools" in template
        self.own: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
        found = (name for name, one in FORMATS.items() if one.mark in template)
        self.name = next(found, None)
        self.format = FORMATS[self.name] if self.name and self.own is None else None
        self.thinks = THINK["open"] in template and self.name != "harmony"
        self.special = special_tokens(tokenizer)
        self._marks = json.dumps(self.own or (self.format and self.format.fields) or "")

    @property
    def reads_calls(self) -> bool:
        """Whether calls are told from text."""
        return self.format is not None or self.own is not None

    @property
    def keeps_special(self) -> bool:
        """Whether the parser must see special tokens."""
        return self.own is not None or any(
            text in self._marks or text in (*THINK.values(), "[TOOL_CALLS]")
            for text in self.special
        )

    def parser(self, prompt: str, tools: list[dict[str, Any]], reads_calls: bool) -> Any | None:
        """Of an answer to the prompt's text; None where there is nothing but text.

        reads_calls : whether calls are looked for.
        """
        if self.own is not None:
            return ResponseParser(self.own, prefix=prompt, tools=tools)
        fields = dict(self.format.fields if self.format else _TEXT)
        if self.thinks:
            fields = {**_THINKING, **fields}
        if not reads_calls:
            fields.pop("tool_calls", None)
        if fields == _TEXT:
            return None
        template = {"start_anchor": _NOWHERE, "fields": fields}
        is_open = self.thinks and prompt.rstrip().endswith(THINK["open"])
        return ResponseParser(template, prefix=THINK["open"] if is_open else "", tools=tools)
