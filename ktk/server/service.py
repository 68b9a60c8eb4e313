"""A request of any route, checked, as what the engine generates from: tokens, sampling, limits."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ktk.generate.engine import Engine, RequestError
from ktk.generate.grammar import Form, Grammar, Grammars
from ktk.generate.open import OpenModel
from ktk.generate.sampling import Sampling
from ktk.generate.text import stop_tokens
from ktk.integration.transformers.replies import ReplyStyle
from ktk.integration.transformers.tokens import (
    Spelling,
    decode,
    encode,
    encode_chat,
    vocabulary_size,
)
from ktk.server.answer import Answer, Answers, Stop
from ktk.server.message import Reader
from ktk.server.metrics import Metrics
from ktk.server.protocol import ChatRequest, CompletionRequest
from ktk.server.tools import Tools

_LAST = 16  # tokens of a prompt that tell whether it began the model's reasoning


def as_chat(fields: dict[str, Any]) -> ChatRequest:
    """A request of another API as one for a chat completion. Raises RequestError."""
    try:
        return ChatRequest.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )
    except ValidationError as error:
        first = max(error.errors(), key=lambda one: len(one["loc"]))
        where = ".".join(map(str, first["loc"]))
        raise RequestError(
            f"{where}: {first['msg'].removeprefix('Value error, ')}", where
        ) from error


class Service:
    """What the routes of one app share."""

    def __init__(self, opened: OpenModel, engine: Engine, metrics: Metrics) -> None:
        self.opened, self.engine, self.metrics = opened, engine, metrics
        self.tokenizer = opened.tokenizer
        self.spelling = Spelling(opened.tokenizer)
        self.created = int(time.time())
        self._style = ReplyStyle(opened.tokenizer)
        self._grammars = Grammars(self.tokenizer, vocabulary_size(opened.model), engine.eos)

    def model_row(self) -> dict[str, Any]:
        return {
            "id": self.opened.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ktk",
            "max_model_len": self.engine.limits.context,
        }

    async def answers(self, request: ChatRequest | CompletionRequest) -> Answers:
        """Checks a request and tokenises its prompts. Raises RequestError, HTTPException."""
        if request.model not in (None, "", self.opened.name):
            raise HTTPException(
                404,
                f"the model {request.model!r:.200} is not served here: only {self.opened.name!r} "
                "is",
            )
        refused = request.refused()
        if refused is not None:
            raise RequestError(refused[1], refused[0])
        # A long text takes a while, in which other answers should go on.
        prompts = await asyncio.to_thread(self.encode, request)
        stop = self._stop(request)
        own = frozenset() if request.ignore_eos else frozenset(self.engine.eos)
        grammar = await asyncio.to_thread(self._grammar, request, prompts[0])
        sampling = request.sampling(self.engine.model.generation_config, own | stop.tokens, grammar)
        self.check_tokens("logit_bias", [token for token, _ in sampling.logit_bias])
        by_prompt = [self._to_prompt(request, ids, sampling, stop) for ids in prompts]
        return Answers(self.metrics, by_prompt, request.num_answers)

    def _to_prompt(
        self,
        request: ChatRequest | CompletionRequest,
        ids: list[int],
        sampling: Sampling,
        stop: Stop,
    ) -> list[Answer]:
        """The answers to one prompt: the seed of each is by one larger than that of the last."""
        limit = self.engine.check(len(ids), request.limit)
        if (request.min_tokens or 0) > limit:
            raise RequestError(
                f"min_tokens={request.min_tokens}: the answer may have {limit} tokens; ask for "
                "fewer",
                "min_tokens",
            )
        if request.num_tried > request.num_answers and sampling.num_logprobs is None:
            sampling = replace(sampling, num_logprobs=0)
        made = []
        for place in range(request.num_tried):
            seed = None if sampling.seed is None else sampling.seed + place
            one = replace(sampling, seed=seed)
            answer = Answer(self.engine, self.metrics, ids, one, limit, stop, request.priority or 0)
            made.append(answer)
        return made

    def _grammar(self, request: ChatRequest | CompletionRequest, ids: list[int]) -> Grammar | None:
        """ids : the first prompt."""
        asked = request.form()
        tools = request.callable if isinstance(request, ChatRequest) else None
        if tools is not None and asked is not None:
            raise RequestError(f"{asked[0]}: not beside tools; leave one out", asked[0])
        if tools is not None and (form := self._form_of_calls(tools, ids)) is not None:
            asked = "tools", form
        if asked is None:
            return None
        name, form = asked
        if request.ignore_eos:
            raise RequestError(
                f"ignore_eos: with {name} the answer ends where its form does", "ignore_eos"
            )
        try:
            return self._grammars.compile(form)
        except ValueError as error:
            raise RequestError(f"{name}: this cannot be enforced: {error}", name) from error

    def _form_of_calls(self, tools: Tools, ids: list[int]) -> Form | None:
        try:
            special = self._grammars.special()
        except ValueError as error:
            if tools.choice == "required":
                raise RequestError(f"tool_choice: {error}", "tool_choice") from error
            return None  # then calls are read where they parse
        end = decode(self.tokenizer, ids[-_LAST:], True)
        return tools.form(self._style, special, self._style.is_open(end))

    def _stop(self, request: ChatRequest | CompletionRequest) -> Stop:
        asked = request.stop_token_ids or []
        self.check_tokens("stop_token_ids", asked)
        try:
            tokens, strings = stop_tokens(self.tokenizer, request.stops)
        except ValueError as error:
            raise RequestError(str(error), "stop") from error
        is_included = bool(request.include_stop_str_in_output)
        keeps_special = self._style.keeps_special and self._parser(request, []) is not None
        return Stop(strings, tokens | set(asked), is_included, keeps_special)

    def readers(self, request: ChatRequest, answers: Answers) -> list[Reader]:
        """What tells the parts of each answer apart."""
        tools, (ids,) = request.callable, answers.prompts
        is_parallel = tools is None or tools.is_parallel
        return [
            Reader(self._parser(request, ids), self._style.new_id, None if is_parallel else 1)
            for _ in range(answers.num_given)
        ]

    def _parser(self, request: ChatRequest | CompletionRequest, ids: list[int]) -> Any | None:
        """None: there is nothing but text in the answer to the prompt ``ids``."""
        if not isinstance(request, ChatRequest) or request.form() is not None:
            return None
        tools = request.callable
        prompt = decode(self.tokenizer, ids, True)
        if tools is None:
            return self._style.parser(prompt, [], False)
        return self._style.parser(prompt, tools.for_parser(), True)

    def check_tokens(self, name: str, tokens: list[int]) -> None:
        """RequestError that names the field, unless all are the model's."""
        vocabulary = vocabulary_size(self.engine.model)
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise RequestError(
                f"{name} has the token {wrong[0]}: must be 0 to {vocabulary - 1}", name
            )

    def echoes(self, request: CompletionRequest) -> list[str]:
        """What the text of each answer that is given begins with."""
        if not request.echo:
            return [""] * len(request.prompts) * request.num_answers
        texts = [one if isinstance(one, str) else self.decode(one) for one in request.prompts]
        return [text for text in texts for _ in range(request.num_answers)]

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return decode(self.tokenizer, ids)

    def encode(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Each prompt's tokens. Raises RequestError."""
        try:
            if isinstance(request, ChatRequest):
                return [self._encode_chat(request)]
            return [self._encode_prompt(prompt) for prompt in request.prompts]
        except ValueError as error:
            raise RequestError(str(error)) from error

    def _encode_chat(self, request: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise RequestError(
                f"{self.opened.name} has no chat template: use /v1/completions, which continues "
                "text"
            )
        tools, own = request.callable, None
        if tools is not None:
            if not (self._style.has_tools and self._style.reads_calls):
                raise RequestError(
                    f"tools: the chat template of {self.opened.name} has no place for tools, or "
                    "calls in a form that is not known here; describe them in the prompt",
                    "tools",
                )
            own = tools.for_template()
        return encode_chat(self.tokenizer, [m.for_template() for m in request.messages], tools=own)

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return encode(self.tokenizer, prompt)
        self.check_tokens("prompt", prompt)
        return prompt
