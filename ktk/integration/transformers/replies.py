"""What chat models write beside an answer's text: reasoning, and calls of tools.

A model's tokenizer may say how (its ``response_template``); of others the chat template tells, by
marks that ``FORMATS`` knows. transformers' own parser reads the text as it comes.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from ktk.integration.transformers.call_formats import FORMATS, THINK
from ktk.integration.transformers.names import ResponseParser
from ktk.integration.transformers.tokens import special_tokens

# Where the parser should begin in a prompt; ours are given what the prompt left open, no more.
_NOWHERE = "\0"
_TEXT = {"content": {"content": "text"}}
_THINKING = {"reasoning_content": {**THINK, "content": "text"}}


class ReplyStyle:
    """Of one model. has_tools : whether its chat template shows tools to it."""

    def __init__(self, tokenizer: Any) -> None:
        templates = getattr(tokenizer, "chat_template", None) or ""
        texts = templates.values() if isinstance(templates, dict) else [templates]
        template = "\n".join(texts)
        self.has_tools = "tools" in template
        self.own: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
        found = (name for name, one in FORMATS.items() if re.search(one.mark, template))
        self.name = next(found, None)
        self.format = FORMATS[self.name] if self.name else None
        self.thinks = THINK["open"] in template and self.name != "harmony"
        self.special = special_tokens(tokenizer)
        self._marks = "" if self.format is None else self.format.written

    @property
    def reads_calls(self) -> bool:
        """Whether calls are told from text."""
        return self.format is not None or self.own is not None

    @property
    def keeps_special(self) -> bool:
        """Whether the parser must see special tokens."""
        return self.own is not None or any(
            text in self._marks or text in THINK.values() for text in self.special
        )

    def parser(self, prompt: str, tools: list[dict[str, Any]], reads_calls: bool) -> Any | None:
        """Of an answer to the prompt's text; None where there is nothing but text.

        tools : with the types of their arguments, for formats that do not show them. reads_calls :
        whether calls are looked for.
        """
        if self.own is not None:
            return ResponseParser(self.own, prefix=prompt, tools=tools)
        if self.format is not None and self.format.tag is None:
            tools = []  # JSON has types
        fields = dict(self.format.fields if self.format else _TEXT)
        if self.thinks:
            fields = {**_THINKING, **fields}
        if not reads_calls:
            fields.pop("tool_calls", None)
        if fields == _TEXT:
            return None
        template = {"start_anchor": _NOWHERE, "fields": fields}
        begun = THINK["open"] if self.is_open(prompt) else ""
        return ResponseParser(template, prefix=begun, tools=tools)

    def is_open(self, prompt: str) -> bool:
        """Whether the answer begins amid reasoning. prompt : its end is enough."""
        return self.thinks and prompt.rstrip().endswith(THINK["open"])

    def new_id(self) -> str:
        """Of a call that has none."""
        letters = uuid.uuid4().hex
        is_short = self.format is not None and self.format.ids == "nine"
        return letters[:9] if is_short else f"call_{letters[:24]}"
