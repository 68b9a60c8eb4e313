"""Answers of a given form: JSON of a schema, a regular expression, a grammar, one of some texts.

Of a form and the tokens so far llguidance tells which tokens may follow; the others are ruled out
before one is chosen.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer

from ktk.integration.transformers.tokens import added_tokens

KEPT = 64  # grammars that were compiled; an agent asks for the same ones again and again
# Between the parts of JSON, as llama.cpp has it: endless space would be valid, too.
SPACE = r"( |\n[ \t]{0,20})?"


Kind = Literal["json_schema", "regex", "grammar", "choice"]


@dataclass(frozen=True)
class Form:
    """What an answer must look like. kind : "json_schema", "regex", "grammar" (GBNF or Lark),
    "choice" (a JSON list of texts); text : it.

    is_lenient : of a JSON schema, keywords that cannot be enforced are left out, not refused.
    """

    kind: Kind
    text: str
    is_lenient: bool = False


class Guide:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (vocab_size,), minus infinity where a token may not follow.

        Raises RuntimeError if the grammar has become too complex.
        """
        if self._matcher.is_error():
            raise RuntimeError(f"the answer's grammar failed: {self._matcher.get_error():.200}")
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, bitorder="little", count=len(logits)).view(bool)
        # By NumPy: torch would start its threads, 1 ms where cores are shared.
        return torch.from_numpy(np.where(bits, logits.numpy(), np.float32(-np.inf)))

    def take(self, token: int) -> None:
        """The token was chosen."""
        self._matcher.consume_token(token)


@dataclass(frozen=True)
class Grammar:
    """A form that was compiled for a tokenizer."""

    matcher: LLMatcher

    def start(self) -> Guide:
        """At an answer's beginning."""
        return Guide(self.matcher.deep_copy())


class Grammars:
    """Those of one tokenizer; made when first asked for, from any thread.

    vocab_size : of the model's logits. ends : the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: set[int]) -> None:
        self._own, self._vocab_size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Form, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def special(self) -> dict[str, int]:
        """Text -> id of the tokens that are text to no grammar, which must name them. More than the
        tokenizer calls special: Qwen's <tool_call> is one. Raises ValueError as ``compile``.
        """
        with self._lock:
            tokenizer = self._opened()
            return {
                text: index
                for index, text in added_tokens(self._own).items()
                if tokenizer.is_special_token(index)
            }

    def compile(self, form: Form) -> Grammar:
        """Raises ValueError, with the reason, for a form that cannot be enforced."""
        with self._lock:
            tokenizer = self._opened()
            if form not in self._kept:
                self._kept[form] = Grammar(self._compiled(form, tokenizer))
            self._kept.move_to_end(form)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[form]

    def _opened(self) -> LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._wrapped()  # some tenths of a second
        return self._tokenizer

    def _wrapped(self) -> LLTokenizer:
        if not self._ends:
            raise ValueError("the model has no token that ends an answer")
        if getattr(self._own, "backend_tokenizer", None) is None:
            raise ValueError(f"a {type(self._own).__name__} does not tell its tokens' bytes")
        return from_tokenizer(self._own, self._vocab_size, self._ends)

    @staticmethod
    def _compiled(form: Form, tokenizer: LLTokenizer) -> LLMatcher:
        if form.kind == "json_schema":
            options: Any = {"whitespace_pattern": SPACE, "lenient": form.is_lenient}
            text = LLMatcher.grammar_from_json_schema(form.text, overrides=options)
        elif form.kind == "choice":
            choices = " | ".join(
                json.dumps(one, ensure_ascii=False) for one in json.loads(form.text)
            )
            text = LLMatcher.grammar_from_lark(f"start: {choices}")
        else:
            text = grammar_from(form.kind, form.text)
        matcher = LLMatcher(tokenizer, text, log_level=0)
        if matcher.is_error():
            raise ValueError(" ".join(matcher.get_error().split())[:300])
        return matcher
