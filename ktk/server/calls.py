"""The grammar of calls of functions, in any of the formats that models write them in: calls that
parse, whose arguments are as their function's schema says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from ktk.generate.grammar import SPACE
from ktk.integration.transformers.call_formats import Format, Tag
from ktk.server.schemas import alone, options, resolved, values

_ANY = r"(.|\n)"
_PLACE = re.compile(r"\{(name|arguments|call|index|key|is_text)\}")
# What may be said of a text, and of arguments in tags, that is enforced or says nothing.
_TEXT_KEYS = {"type", "title", "description", "default", "examples", "enum", "const"}
_TEXT_KEYS |= {"minLength", "maxLength", "pattern"}
_OBJECT_KEYS = {"type", "title", "description", "properties", "required", "additionalProperties"}
_OBJECT_KEYS |= {"$defs", "definitions", "$schema"}
# JSON's texts of a type, as regular expressions, where a value may be a text, too.
_PLAIN = {
    "null": "null",
    "boolean": "true|false",
    "integer": "-?[0-9]{1,18}",
    "number": "-?[0-9]{1,18}(\\.[0-9]{1,18})?",
}


class UnenforceableError(ValueError):
    """A strict function's schema asks for what no grammar here enforces."""


@dataclass(frozen=True)
class Function:
    """One that may be called. parameters : its arguments' schema. is_strict : whether what cannot
    be enforced is refused, not left out.
    """

    name: str
    parameters: dict[str, Any]
    is_strict: bool = False


class CallGrammar:
    """For one request. special : text -> id of the tokens that are no text to a grammar. thinks :
    whether the model writes its reasoning. is_open : the prompt began it.

    Its methods give Lark, and raise UnenforceableError.
    """

    def __init__(
        self,
        own: Format,
        functions: list[Function],
        is_parallel: bool,
        special: dict[str, int],
        thinks: bool = False,
        is_open: bool = False,
    ) -> None:
        self._own, self._functions, self._special = own, functions, special
        self._is_parallel = is_parallel and own.between is not None
        self._thinks, self._is_open = thinks, is_open
        self._rules: dict[str, str] = {
            "TEXT": f"/{_ANY}*/",
            "SPACES": r"/[ \n]{1,3}/",
            "INDEX": "/[0-9]{1,4}/",
            "KEY": r'/[^<>"\n]{1,64}/',
        }

    def required(self) -> str:
        """Calls, and before them no more than reasoning."""
        calls = self._calls("")
        if self._is_open:
            return self._lark(f"{self._until(self._own.thought[1], 'thought')} SPACES? {calls}")
        if self._own.preambles:
            return self._lark(f"({self._preambles()})* {calls}")
        thought = f"({self._thought()} SPACES?)? " if self._thinks else ""
        return self._lark(f"{thought}{calls}")

    def free(self) -> str | None:
        """Text, in which what begins like a call becomes one; None where nothing tells calls."""
        own = self._own
        if own.text is not None:
            if self._first_special(own.text) != 0:  # its marks would be text, too
                return None
            text = f"{self._literal(own.text)} TEXT"
            return self._lark(f"({self._preambles()})* ({self._calls('')} | {text})")
        if not own.trigger:
            return None
        if self._first_special(own.trigger) == 0:
            head = f"TEXT {self._literal(own.trigger)}"
        else:
            word = own.trigger.strip()
            self._rules["head[lazy]"] = f"TEXT {_quoted(word)}"
            head = f"head {self._literal(own.trigger[len(word) :])}"
        body = f"({head} {self._calls(own.trigger)} | TEXT)"
        if self._is_open:
            return self._lark(f"{self._until(own.thought[1], 'thought')} {body} | TEXT")
        if self._thinks and self._first_special(own.thought[0]) == 0:
            body = f"(TEXT {self._thought()})? {body}"
        return self._lark(body)

    def _lark(self, start: str) -> str:
        rules = {"start": start, **self._rules}
        return "".join(f"{name}: {body}\n" for name, body in rules.items())

    def _thought(self) -> str:
        begin, end = self._own.thought
        return f"{self._literal(begin)} {self._until(end, 'thought')}"

    def _preambles(self) -> str:
        said = [
            f"{self._literal(begin)} {self._until(end, f'preamble_{place}')}"
            for place, (begin, end) in enumerate(self._own.preambles)
        ]
        return " | ".join([self._thought(), *said])

    def _calls(self, begun: str) -> str:
        """All calls of an answer. begun : what of them is written already."""
        own = self._own
        for place, function in enumerate(self._functions):
            self._rules[f"call_{place}"] = self._call(place, function, "")
        names = [f"call_{place}" for place in range(len(self._functions))]
        self._rules["call"] = " | ".join(names)
        first, before = "call", own.before.removeprefix(begun)
        if begun and not own.before:
            first = "begun"
            bodies = (self._call(*one, begun) for one in enumerate(self._functions))
            self._rules["begun"] = " | ".join(bodies)
        more = f"({self._literal(own.between or '')} call)*" if self._is_parallel else ""
        return f"{self._literal(before)} {first} {more} {self._literal(own.after)}"

    def _call(self, place: int, function: Function, begun: str) -> str:
        written = []
        for text in (self._own.call, *self._own.others):
            if not text.startswith(begun):
                continue
            parts = _PLACE.split(text.removeprefix(begun))
            own = [self._literal(parts[0])]
            for kind, after in zip(parts[1::2], parts[2::2], strict=True):
                if kind == "name":
                    own.append(self._literal(function.name))
                elif kind == "index":
                    own.append("INDEX")
                else:
                    own.append(self._arguments(place, function, kind == "call"))
                own.append(self._literal(after))
            written.append(" ".join(own))
        return " | ".join(f"({one})" for one in written)

    def _arguments(self, place: int, function: Function, has_name: bool) -> str:
        """The rule of a function's arguments. has_name : its name is in the same JSON."""
        rule = f"arguments_{place}"
        if rule in self._rules:
            return rule
        if self._own.tag is not None:
            self._rules[rule] = self._in_tags(rule, function, self._own.tag)
        elif has_name:
            # The schema stays by itself: what it refers to begins at its root.
            name, arguments = self._own.keys
            words = ("{", f'"{name}"', ":", f'"{function.name}"', ",", f'"{arguments}"', ":")
            self._rules["GAP"] = f"/{SPACE}/"
            before = " GAP ".join(map(_quoted, words))
            self._rules[rule] = f"{before} GAP {_json(function.parameters)} GAP {_quoted('}')}"
        else:
            self._rules[rule] = _json(function.parameters)
        return rule

    def _in_tags(self, rule: str, function: Function, tag: Tag) -> str:
        root = function.parameters
        own = resolved(root, root)
        if function.is_strict and (more := set(own) - _OBJECT_KEYS):
            raise UnenforceableError(f"{', '.join(sorted(more))}: not in this model's format")
        found = own.get("properties")
        properties = found if isinstance(found, dict) else {}
        if not properties:
            if own.get("additionalProperties") is False:
                return ""
            return f"({self._in_tag(tag, rule, 'KEY', f'{_ANY}*')})*"
        written = []
        for number, (key, schema) in enumerate(properties.items()):
            name = f"{rule}_{number}"
            text = self._text(schema, function)
            if text is None:
                value = _json(alone(resolved(schema, root), root))
                self._rules[name] = self._in_tag(tag, name, _quoted(key), None, value)
            else:
                self._rules[name] = self._in_tag(tag, name, _quoted(key), text)
            written.append(name if key in own.get("required", ()) else f"{name}?")
        return " ".join(written)

    def _in_tag(self, tag: Tag, name: str, key: str, text: str | None, value: str = "") -> str:
        """An argument: its value is a text, a regular expression of Lark's, or else JSON."""
        parts = _PLACE.split(tag.around.partition("{value}")[0])
        own = [self._literal(parts[0])]
        for kind, after in zip(parts[1::2], parts[2::2], strict=True):
            is_text = "false" if text is None else "true"
            own += [key if kind == "key" else _quoted(is_text), self._literal(after)]
        if text is None:
            self._rules[f"{name}_json"] = value
            return f"{' '.join(own)} {name}_json {self._literal(tag.close)}"
        return f"{' '.join(own)} {self._until(tag.close, f'{name}_text', text)}"

    def _text(self, schema: Any, function: Function) -> str | None:
        """The texts that a value may be; None where it is never one."""
        parts = options(schema, function.parameters)
        kinds = [one.get("type") for one in parts]
        lists = [values(one) for one in parts]
        is_text = [
            kind in (None, "string") and (listed is None or any(isinstance(v, str) for v in listed))
            for kind, listed in zip(kinds, lists, strict=True)
        ]
        if not any(is_text):
            return None
        texts = []
        for kind, listed, own in zip(kinds, lists, parts, strict=True):
            if listed is not None:
                shown = (v if isinstance(v, str) else json.dumps(v) for v in listed)
                texts += [f"/{_escaped(one)}/" if one else '""' for one in shown]
            elif kind in _PLAIN and not set(own) - _TEXT_KEYS:
                texts.append(f"/{_PLAIN[kind]}/")
            elif kind in (None, "string"):
                texts.append(self._of_length(own, function))
            elif function.is_strict and f"/{_ANY}*/" not in texts:
                raise UnenforceableError(f"a text or {kind}: not in this model's format")
            else:
                texts.append(f"/{_ANY}*/")
        return f"({' | '.join(dict.fromkeys(texts))})"

    def _of_length(self, schema: dict[str, Any], function: Function) -> str:
        if function.is_strict and (more := set(schema) - _TEXT_KEYS):
            raise UnenforceableError(f"{', '.join(sorted(more))}: not in this model's format")
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        length = "*" if not least and most == "" else f"{{{least},{most}}}"
        text = f"/{_ANY}{length}/"
        if not isinstance(pattern := schema.get("pattern"), str):
            return text
        if (matched := _matching(pattern)) is not None:
            return f"({matched} & {text})" if length != "*" else matched
        if function.is_strict:
            raise UnenforceableError(f"the pattern {pattern!r:.100} is not understood")
        return text

    def _until(self, close: str, name: str, text: str = f"/{_ANY}*/") -> str:
        """A text, a regular expression of Lark's, and what closes it where that comes first."""
        place = self._first_special(close)
        if place is not None:
            before = f" {_quoted(close[:place])}" if place else ""
            self._rules[name.upper()] = f"{text}{before}"
            return f"{name.upper()} {self._literal(close[place:])}"
        word = close.strip()
        end = close.index(word) + len(word)
        inside = f"/{_ANY}*{_escaped(word)}{_ANY}+/"
        self._rules[f"{name}[lazy]"] = f"({text} {_quoted(close[:end])}) & ~{inside}"
        return f"{name} {self._literal(close[end:])}"

    def _first_special(self, text: str) -> int | None:
        """Where in a text the first token is that grammars must name by its number."""
        found = (text.find(one) for one in self._special if one)
        return min((place for place in found if place >= 0), default=None)

    def _literal(self, text: str) -> str:
        """As Lark has it."""
        own = []
        while text:
            place = self._first_special(text)
            if place == 0:
                word = max((one for one in self._special if one and text.startswith(one)), key=len)
                own.append(f"<[{self._special[word]}]>")
                text = text[len(word) :]
            else:
                own.append(_quoted(text[:place]))
                text = "" if place is None else text[place:]
        return " ".join(own)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text as a regular expression of Lark's."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text).replace("\n", r"\n")


def _json(schema: dict[str, Any]) -> str:
    own = {**schema, "x-guidance": {"whitespace_pattern": SPACE, "lenient": True}}
    return f"%json {json.dumps(own)}"


def _matching(pattern: str) -> str | None:
    """A schema's pattern, which may match anywhere, for whole texts; None if it is none here."""
    head, tail = f"{_ANY}*", f"{_ANY}*"
    if pattern.startswith("^"):
        pattern, head = pattern[1:], ""
    if re.search(r"(?<!\\)(\\\\)*\$\Z", pattern):
        pattern, tail = pattern[:-1], ""
    whole = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern).replace("\n", r"\n")
    made = f"/{head}({whole}){tail}/"
    why = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(f"start: {made}"))
    return made if not why or why.startswith("WARNING") else None
