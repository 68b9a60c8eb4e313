"""How models write calls of tools: one row a format, to read calls by and to force them.

Names, values and JSON are as the models' chat templates show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

THINK = {"open": "<think>", "close": "</think>"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_CALL = {"type": "function", "function": "{content}"}


@dataclass(frozen=True)
class Tag:
    """One argument, where each is written by itself. around : with {key}, {value} and, where texts
    are told from JSON, {is_text}.
    """

    around: str

    @property
    def close(self) -> str:
        """What ends the value."""
        return self.around.partition("{value}")[2]


@dataclass(frozen=True)
class Format:
    """mark : a regular expression; a chat template that has it shows calls so. fields : of
    transformers' response templates.

    call : one call, with {name} and {arguments}, or {call}: JSON of both, under ``keys``; {index}
    is any number. before, after : around all calls of an answer. between : two of them; None: there
    is only one. trigger : what tells, in an answer, that calls begin; "": nothing does.
    tag : of an argument; None: arguments are JSON. thought : around reasoning.
    preambles : around texts that may come before calls, text : around one that comes instead, where
    no text is without marks. others : how a call may begin as well.
    """

    mark: str
    fields: dict[str, Any]
    call: str
    before: str = ""
    after: str = ""
    between: str | None = None
    trigger: str = ""
    keys: tuple[str, str] = ("name", "arguments")
    tag: Tag | None = None
    thought: tuple[str, str] = (THINK["open"], THINK["close"])
    preambles: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    others: tuple[str, ...] = ()
    ids: Literal["long", "nine"] = "long"  # nine letters are all that Mistral's templates take

    @property
    def written(self) -> str:
        """All that is written around what varies."""
        own = [self.before, self.call, self.after, self.text or "", *self.thought, *self.others]
        for begin, end in self.preambles:
            own += [begin, end]
        return " ".join([*own, self.trigger, "" if self.tag is None else self.tag.around])


def _calls(opens: str, content: str = "json", **more: Any) -> dict[str, Any]:
    return {"tool_calls": {"open_pattern": opens, "content": content, "repeats": True, **more}}


def _tags(opens: str, closes: str, key: str, close: str, **more: Any) -> dict[str, Any]:
    """Calls whose arguments stand between tags. A value ends where an argument or nothing follows
    its tag: a text in it may be about tags, too.
    """
    pattern = rf"{key}(?P<value>.*?){close}(?=\s*(?:{key.partition('(')[0]}|\Z))"
    return _calls(
        opens,
        "xml-inline",
        close_pattern=closes,
        content_args={"tag_pattern": pattern},
        transform=_NAMED,
        **more,
    )


def _after(mark: str) -> dict[str, Any]:
    """What stands after all calls, which is nobody's."""
    own = {"open_pattern": rf"\s*{mark}", "close_pattern": "(?=.)", "content": "text"}
    return {"after_calls": {**own, "repeats": True}}


_TEXT = {"content": {"content": "text"}}
_NAME = r"(?P<name>[\w.-]+)"
_HARMONY_END = "<|end|><|start|>assistant"

# The first whose mark a template has.
FORMATS = {
    "harmony": Format(
        r"<\|channel\|>",
        {
            "reasoning_content": {
                "open": "<|channel|>analysis<|message|>",
                "close": "<|end|>",
                "content": "text",
            },
            **_calls(
                rf"(?:<\|channel\|>\w+ to=functions\.{_NAME}"
                rf"| to=functions\.{_NAME}<\|channel\|>\w+)"
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
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
        thought=("<|channel|>analysis<|message|>", _HARMONY_END),
        preambles=(("<|channel|>commentary<|message|>", _HARMONY_END),),
        text="<|channel|>final<|message|>",
        others=(" to=functions.{name}<|channel|>commentary json<|message|>{arguments}",),
    ),
    "dsml": Format(
        "｜DSML｜",
        {
            **_tags(
                r'\s*(?:<｜DSML｜\w+>)?\s*<｜DSML｜invoke name="(?P<name>[^"\n]+)">',
                r"</｜DSML｜invoke>",
                r'<｜DSML｜parameter name="(?P<key>[^"\n]+)"(?: string="\w+")?>',
                "</｜DSML｜parameter>",
            ),
            **_after("</｜DSML｜function_calls>"),
            **_TEXT,
        },
        '<｜DSML｜invoke name="{name}">\n{arguments}</｜DSML｜invoke>\n',
        before="<｜DSML｜function_calls>\n",
        after="</｜DSML｜function_calls>",
        between="",
        trigger="<｜DSML｜function_calls>",
        tag=Tag('<｜DSML｜parameter name="{key}" string="{is_text}">{value}</｜DSML｜parameter>\n'),
    ),
    "minimax": Format(
        "<minimax:tool_call>",
        {
            **_tags(
                r'\s*(?:<minimax:tool_call>)?\s*<invoke name="(?P<name>[^"\n]+)">',
                r"</invoke>",
                r'<parameter name="(?P<key>[^"\n]+)">',
                "</parameter>",
            ),
            **_after("</minimax:tool_call>"),
            **_TEXT,
        },
        '<invoke name="{name}">\n{arguments}</invoke>\n',
        before="<minimax:tool_call>\n",
        after="</minimax:tool_call>",
        between="",
        trigger="<minimax:tool_call>",
        tag=Tag('<parameter name="{key}">{value}</parameter>\n'),
    ),
    "deepseek r1": Format(
        "(?s)<｜tool▁sep｜>.*```json",
        {
            **_calls(
                rf"\s*(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>function<｜tool▁sep｜>{_NAME}"
                r"\s*```json",
                close_pattern=r"```\s*<｜tool▁call▁end｜>",
                transform=_NAMED,
            ),
            **_after("<｜tool▁calls▁end｜>"),
            **_TEXT,
        },
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
        between="\n",
        trigger="<｜tool▁calls▁begin｜>",
    ),
    "deepseek": Format(
        "<｜tool▁sep｜>",
        {
            **_calls(
                rf"\s*(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>{_NAME}<｜tool▁sep｜>",
                close_pattern="<｜tool▁call▁end｜>",
                transform=_NAMED,
            ),
            **_after("<｜tool▁calls▁end｜>"),
            **_TEXT,
        },
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
        between="",
        trigger="<｜tool▁calls▁begin｜>",
    ),
    "kimi": Format(
        r"<\|tool_call_argument_begin\|>|tool_declare<\|im_middle\|>",
        {
            **_calls(
                r"\s*(?:<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>\s*"
                rf"(?P<id>(?:functions\.)?{_NAME}:\d+)\s*<\|tool_call_argument_begin\|>",
                close_pattern=r"<\|tool_call_end\|>",
                transform={**_NAMED, "id": "{id}"},
            ),
            **_after(r"<\|tool_calls_section_end\|>"),
            **_TEXT,
        },
        "<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|>",
        before="<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
        between="",
        trigger="<|tool_calls_section_begin|>",
    ),
    "glm": Format(
        "<arg_key>",
        {
            **_tags(
                rf"\s*<tool_call>\s*{_NAME}\s*(?=<)",
                "</tool_call>",
                r"<arg_key>(?P<key>[^<\n]+)</arg_key>\s*<arg_value>",
                "</arg_value>",
            ),
            **_TEXT,
        },
        "<tool_call>{name}\n{arguments}</tool_call>",
        between="\n",
        trigger="<tool_call>",
        tag=Tag("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"),
    ),
    "xml": Format(
        "<function=",
        {
            **_tags(
                r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                r"</function>\s*</tool_call>",
                # Of the space around a value one line end on each side is the format's.
                r"<parameter=(?P<key>[^>\n]+)>\n?",
                r"\n?</parameter>",
            ),
            **_TEXT,
        },
        "<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
        between="\n",
        trigger="<tool_call>",
        tag=Tag("<parameter={key}>\n{value}\n</parameter>\n"),
    ),
    "hermes": Format(
        "<tool_call>",
        {**_calls(r"\s*<tool_call>", close="</tool_call>", transform=_CALL), **_TEXT},
        "<tool_call>\n{call}\n</tool_call>",
        between="\n",
        trigger="<tool_call>",
    ),
    "mistral with [ARGS]": Format(
        r"\[ARGS\]",
        {
            **_calls(
                rf"\[TOOL_CALLS\]{_NAME}(?:\[CALL_ID\]\w+)?\[ARGS\]",
                close_pattern=r"(?=\[TOOL_CALLS\])",
                transform=_NAMED,
            ),
            **_TEXT,
        },
        "[TOOL_CALLS]{name}[ARGS]{arguments}",
        between="",
        trigger="[TOOL_CALLS]",
        ids="nine",
    ),
    "mistral": Format(
        r"\[TOOL_CALLS\]",
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
        "{call}",
        before="[TOOL_CALLS][",
        after="]",
        between=", ",
        trigger="[TOOL_CALLS]",
        ids="nine",
    ),
    "llama": Format(
        r"<\|python_tag\|>",
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
        "{call}",
        keys=("name", "parameters"),
    ),
}
