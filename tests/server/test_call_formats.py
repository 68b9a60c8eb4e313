"""Calls in the formats that models write them in: told from text as they come, and forced, so that
they parse and keep to their schema, whatever a model would rather say.

TEMPLATES has the lines of the families' chat templates that show calls; WRITTEN what those render.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
import torch

from ktk.generate.engine import RequestError
from ktk.generate.grammar import Form, Grammars
from ktk.integration.transformers.call_formats import FORMATS
from ktk.integration.transformers.replies import ReplyStyle
from ktk.integration.transformers.tokens import encode_chat
from ktk.server.message import Reader, Said
from ktk.server.tools import Tool, Tools
from make.serving import SEED, make_tokenizer

EDIT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "edit",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "maxLength": 12},
                "line": {"type": "integer", "minimum": 0, "maximum": 99},
                "at": {"$ref": "#/$defs/Place"},
                "mode": {"enum": ["new", "old"]},
                "note": {
                    "anyOf": [{"type": "string", "pattern": "^[a-f]{1,3}$"}, {"type": "null"}]
                },
            },
            "required": ["text", "line"],
            "additionalProperties": False,
            "$defs": {
                "Place": {
                    "type": "object",
                    "properties": {"x": {"type": "boolean"}},
                    "required": ["x"],
                    "additionalProperties": False,
                }
            },
        },
    },
}
NOW: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "now",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
TOOLS = [EDIT, NOW]
ARGUMENTS = {"text": "  if a < b:\n", "line": 3, "at": {"x": True}, "mode": "old", "note": None}
TEMPLATES = {
    "harmony": '{{- "<|start|>assistant to=" }}{{- "functions." + tool_call.name + "<|channel|>'
    'commentary " }}{{- "json<|message|>" }}{{- tool_call.arguments|tojson }}{{- "<|call|>" }}',
    "dsml": '{%- set dsml_token = "｜DSML｜" -%}<{{ dsml_token }}invoke name="{{ name }}"> <think>',
    "minimax": "{%- set toolcall_begin_token   = '<minimax:tool_call>' -%} <think>",
    "deepseek r1": "{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']"
    "['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + "
    "'<｜tool▁call▁end｜>'}} <think>",
    "deepseek": "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + "
    "'<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>'}} <think>",
    "kimi": "<|tool_call_begin|>{{ formatted_id }}<|tool_call_argument_begin|>{{ a | tojson }} "
    "<think>",
    "glm": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>... <think>",
    "xml": "{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }} <think>",
    "hermes": '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>} <think>',
    "mistral with [ARGS]": "{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
    "mistral": '{{- "[TOOL_CALLS][" }}{%- for tool_call in message.tool_calls %}',
    "llama": '{{- "<|python_tag|>" + tool_call.name + ".call(" }}',
}
_TEXT = ARGUMENTS["text"]
_JSON = json.dumps(ARGUMENTS)
WRITTEN = {
    "harmony": f"<|channel|>commentary to=functions.edit <|constrain|>json<|message|>{_JSON}",
    "dsml": "<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="edit">\n'
    f'<｜DSML｜parameter name="text" string="true">{_TEXT}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="line" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="at" string="false">{"x": true}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="mode" string="true">old</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="note" string="true">null</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>",
    "minimax": '<minimax:tool_call>\n<invoke name="edit">\n'
    f'<parameter name="text">{_TEXT}</parameter>\n<parameter name="line">3</parameter>\n'
    '<parameter name="at">{"x": true}</parameter>\n<parameter name="mode">old</parameter>\n'
    '<parameter name="note">null</parameter>\n</invoke>\n'
    '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "deepseek r1": "<｜tool▁calls▁begin｜>"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>edit\n```json\n"
    f"{_JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n"
    "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>edit<｜tool▁sep｜>{_JSON}"
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.edit:0"
    f"<|tool_call_argument_begin|>{_JSON}<|tool_call_end|><|tool_call_begin|>functions.now:1"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "glm": f"<tool_call>edit\n<arg_key>text</arg_key>\n<arg_value>{_TEXT}</arg_value>\n"
    "<arg_key>line</arg_key>\n<arg_value>3</arg_value>\n<arg_key>at</arg_key>\n"
    '<arg_value>{"x": true}</arg_value>\n<arg_key>mode</arg_key>\n<arg_value>old</arg_value>\n'
    "<arg_key>note</arg_key>\n<arg_value>null</arg_value>\n</tool_call>\n"
    "<tool_call>now\n</tool_call>",
    "xml": f"<tool_call>\n<function=edit>\n<parameter=text>\n{_TEXT}\n</parameter>\n"
    "<parameter=line>\n3\n</parameter>\n"
    '<parameter=at>\n{"x": true}\n</parameter>\n<parameter=mode>\nold\n</parameter>\n'
    "<parameter=note>\nnull\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "hermes": f'<tool_call>\n{{"name": "edit", "arguments": {_JSON}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "mistral with [ARGS]": f"[TOOL_CALLS]edit[ARGS]{_JSON}[TOOL_CALLS]now[ARGS]{{}}",
    "mistral": f'[TOOL_CALLS][{{"name": "edit", "arguments": {_JSON}}}, '
    '{"name": "now", "arguments": {}}]',
    "llama": f'{{"name": "edit", "parameters": {_JSON}}}',
}
MARKS = re.compile(
    r"<[|｜][^<>]*?[|｜]>|｜DSML｜|</?(?:tool_call|arg_key|arg_value|think)>|\[[A-Z_]+\]"
)
ALONE = ("harmony", "llama")  # one call an answer
ENDS = 2


def tokenizer_of(name: str) -> Any:
    """In which a family's marks are tokens, as in its own; those in brackets are called special."""
    from tokenizers import AddedToken

    made = make_tokenizer()
    marks = dict.fromkeys(MARKS.findall(WRITTEN[name] + "<|start|><|end|><think></think>"))
    made.add_tokens([AddedToken(one, special=one[1] in "|｜T") for one in marks])
    made.chat_template = "tools " + TEMPLATES[name]
    return made


class Family:
    def __init__(self, name: str, has_marks: bool) -> None:
        self.tokenizer = tokenizer_of(name) if has_marks else make_tokenizer()
        self.tokenizer.chat_template = "tools " + TEMPLATES[name]
        self.style = ReplyStyle(self.tokenizer)
        self.grammars = Grammars(self.tokenizer, len(self.tokenizer) + 2, {ENDS})

    def form(self, choice: str, is_open: bool = False, **more: Any) -> Form | None:
        tools = [Tool(**one) for one in more.get("tools", TOOLS)]
        tools = Tools(tools, choice, more.get("is_parallel", True))
        return tools.form(self.style, self.grammars.special(), is_open)

    def takes(self, text: str, form: Form | None) -> bool:
        assert form is not None
        matcher = self.grammars.compile(form).start()._matcher
        ids = self.tokenizer(text)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def read(self, text: str, size: int, prompt: str = "") -> Said:
        tools = Tools([Tool(**one) for one in TOOLS], "auto", True)
        parser = self.style.parser(prompt, tools.for_parser(), True)
        reader = Reader(parser, self.style.new_id)
        parts = [reader.add(text[place : place + size]) for place in range(0, len(text), size)]
        parts.append(reader.finish())
        made = Said()
        for part in parts:
            made.content += part.content
            made.reasoning += part.reasoning
            made.calls += part.calls
        return made


@pytest.fixture(params=[True, False], ids=["tokens", "letters"])
def has_marks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("name", FORMATS)
def test_calls_of_every_format_are_read_and_forced(name: str, has_marks: bool) -> None:
    family = Family(name, has_marks)
    assert family.style.name == name
    text = WRITTEN[name]
    for size in (1, 5, 1000):
        said = family.read(text, size)
        found = [(call.name, json.loads(call.arguments)) for call in said.calls]
        assert found == [("edit", ARGUMENTS), ("now", {})][: 1 if name in ALONE else 2]
        assert not said.content and len({call.id for call in said.calls}) == len(found)
    assert family.takes(text, family.form("required"))
    assert not family.takes("Hello", family.form("required"))
    for wrong in (text.replace("edit", "exit"), text.replace("old", "odd"), text + "so"):
        assert not family.takes(wrong, family.form("required"))


@pytest.mark.parametrize("name", FORMATS)
def test_text_is_free_until_a_call_begins(name: str, has_marks: bool) -> None:
    family = Family(name, has_marks)
    form = family.form("auto")
    if name == "llama" or (name == "harmony" and not has_marks):
        assert form is None
        return
    text = WRITTEN[name]
    if name == "harmony":
        thought, said = "<|channel|>analysis<|message|>Hm.", "<|channel|>final<|message|>Hello"
        text = f"{thought}<|end|><|start|>assistant{text}"
    else:
        said, text = "Hello <b> {", f"Hm.\n{text}"
    assert family.takes(said, form) and not family.takes(said, family.form("required"))
    assert family.takes(text, form)
    for wrong in (text.replace("edit", "exit"), text.replace("old", "odd"), f"{text}so"):
        assert not family.takes(wrong, form)
    for size in (1, 1000):
        read = family.read(text, size)
        assert (read.content + read.reasoning).strip() == "Hm."
        assert json.loads(read.calls[0].arguments) == ARGUMENTS
        assert family.read(said, size).content == said.split("|>")[-1]


@pytest.mark.parametrize("name", [name for name in FORMATS if "<think>" in TEMPLATES[name]])
def test_reasoning_comes_before_calls_that_are_forced(name: str) -> None:
    family = Family(name, True)
    thought, call = "So <b>.", WRITTEN[name]
    for choice in ("required", "auto"):
        closed, opened = family.form(choice), family.form(choice, is_open=True)
        assert family.takes(f"<think>{thought}</think>\n\n{call}", closed)
        assert family.takes(f"{thought}</think>\n\n{call}", opened)
        assert not family.takes(f"{thought}</think>\n\n{call}so", opened)
        assert family.takes(call, closed)
    assert not family.takes(call, family.form("required", is_open=True))
    read = family.read(f"{thought}</think>\n\n{call}", 3, "<think>\n")
    assert read.reasoning == thought and len(read.calls) == 2 and not read.content


def is_valid(arguments: dict[str, Any]) -> bool:
    """As EDIT's schema says."""
    own = {
        "text": lambda v: isinstance(v, str) and len(v) <= 12,
        "line": lambda v: type(v) is int and 0 <= v <= 99,
        "at": lambda v: isinstance(v, dict) and set(v) == {"x"} and isinstance(v["x"], bool),
        "mode": lambda v: v in ("new", "old"),
        "note": lambda v: v is None or re.fullmatch("[a-f]{1,3}", v) is not None,
    }
    return {"text", "line"} <= set(arguments) <= set(own) and all(
        own[key](value) for key, value in arguments.items()
    )


def test_the_check_of_arguments_rejects() -> None:
    assert is_valid(ARGUMENTS)
    for wrong in ({"line": "3"}, {"at": {}}, {"mode": "odd"}, {"note": "abcd"}, {"more": 1}):
        assert not is_valid({**ARGUMENTS, **wrong})
    assert not is_valid({"text": "a"})


@pytest.mark.parametrize("name", FORMATS)
def test_calls_parse_whatever_the_tokens(name: str) -> None:
    """Of those that may follow one by chance, but the answer's end once it may."""
    family = Family(name, True)
    family.style.thinks = False  # a thought has no end by chance
    form = family.form("required", tools=[EDIT], is_parallel=False)
    assert form is not None
    zeros, chance = torch.zeros(len(family.tokenizer) + 2), random.Random(SEED)
    for _ in range(3):
        guide, ids = family.grammars.compile(form).start(), list[int]()
        while True:
            allowed = torch.isfinite(guide.allowed(zeros)).nonzero().flatten().tolist()
            if ENDS in allowed:
                break
            ids.append(chance.choice(allowed))
            guide.take(ids[-1])
            assert len(ids) < 1000
        text = family.tokenizer.decode(ids)
        calls = family.read(text, 1000).calls
        assert calls and all(is_valid(json.loads(call.arguments)) for call in calls), text


def test_values_between_tags_keep_their_space_and_may_be_about_tags() -> None:
    family = Family("xml", True)
    value = "\n  </parameter> and </function>\n"
    text = WRITTEN["xml"].replace(str(ARGUMENTS["text"]), value)
    for size in (1, 1000):
        call = family.read(text, size).calls[0]
        assert json.loads(call.arguments)["text"] == value
    inline = "<tool_call><function=edit><parameter=text>a</parameter><parameter=line>7</parameter>"
    call = family.read(inline + "</function></tool_call>", 1).calls[0]
    assert json.loads(call.arguments) == {"text": "a", "line": 7}


def test_a_strict_function_is_refused_where_tags_cannot_hold_it() -> None:
    def form(name: str, schema: dict[str, Any], is_strict: bool = True) -> Form | None:
        parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        function = {"name": "f", "parameters": parameters, "strict": is_strict}
        return Family(name, True).form("auto", tools=[{"type": "function", "function": function}])

    for schema in ({"type": "string", "format": "date"}, {"type": "string", "pattern": "(?=a)b"}):
        with pytest.raises(RequestError, match="strict"):
            form("xml", schema)
        assert form("xml", schema, False) is not None
    assert form("hermes", {"type": "string", "format": "date"}) is not None
    for pattern, takes in (("^a/b+$", "a/bb"), ("c.d", "xcodx"), (r"\$", "5$")):
        own = form("xml", {"type": "string", "pattern": pattern})
        text = (
            "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"
        )
        assert Family("xml", True).takes(text.format(takes), own)
        assert not Family("xml", True).takes(text.format("ab"), own)


def test_calls_have_ids_that_their_templates_take() -> None:
    assert Family("kimi", True).read(WRITTEN["kimi"], 9).calls[1].id == "functions.now:1"
    (first, second) = Family("mistral", True).read(WRITTEN["mistral"], 9).calls
    assert re.fullmatch("[0-9a-f]{9}", first.id) and first.id != second.id


def test_what_is_no_call_is_given_back() -> None:
    for name, text in (("kimi", "<|tool_calls_section_begin|>no"), ("glm", "<tool_call>no such")):
        assert Family(name, True).read(f"Hm {text}", 1).content == f"Hm {text}"


def test_a_template_may_want_arguments_as_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ '[' + c.function.name + ' ' + c.function.arguments + ']' }}{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "ö"}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert tokenizer.decode(encode_chat(tokenizer, messages)) == '[f {"a": "ö"}]'
    tokenizer.chat_template = "{{ 1 + '2' }}"
    with pytest.raises(ValueError, match="refuses these messages"):
        encode_chat(tokenizer, messages)
