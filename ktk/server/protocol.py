"""The OpenAI API's requests, as far as this server serves them: checked,
with what is not served refused (``fields.py``).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from ktk.generate.sampling import Grammar, Sampling
from ktk.integration.transformers.tokens import own_sampling
from ktk.server.fields import FIELDS, MESSAGE_FIELDS, PART_FIELDS, STREAM_FIELDS, Known, refusal
from ktk.server.structured import Structured
from ktk.server.tools import NamedChoice, Tool, ToolChoice, Tools

MAX_STOP = 16
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64
MAX_ANSWERS = 64  # to one prompt
MAX_PROMPTS = 256
MAX_TOOLS = 128

Temperature = Annotated[float, Field(ge=0, le=2, strict=True)]
Probability = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Answers = Annotated[int, Field(ge=1, le=MAX_ANSWERS, strict=True)]
Penalty = Annotated[float, Field(ge=-2, le=2, strict=True)]
Bias = Annotated[float, Field(ge=-100, le=100, strict=True)]
# Seeds are 64 bits there; a generator of torch takes those.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]


class _Part(BaseModel):
    """Of a request. known : its fields that are not served, but have values that change nothing."""

    model_config = ConfigDict(extra="allow")
    known: ClassVar[dict[str, Known]]

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        if refused := refusal(self.model_extra, self.known):
            raise ValueError(refused[1])
        return self


class StreamOptions(_Part):
    known = STREAM_FIELDS

    include_usage: StrictBool | None = None


class _Request(Structured):
    """What chat and plain completions share. Fields that have none here are left to ``refused``."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, strict=True)] | None = None  # -1: all, as 0
    seed: Seed | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: StrictBool | None = None
    min_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    ignore_eos: StrictBool | None = None
    priority: StrictInt | None = None
    n: Answers | None = None
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, strict=True)] | None = None
    # By token; JSON's keys are texts.
    logit_bias: dict[Annotated[int, Field(ge=0)], Bias] | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOP:
            raise ValueError(f"has {len(stop)} strings: at most {MAX_STOP}")
        if any(not text for text in ([stop] if isinstance(stop, str) else stop or [])):
            raise ValueError("has an empty string: every stop string needs a character")
        return stop

    def refused(self) -> tuple[str, str] | None:
        """(field, why) of the first field that asks for what is not served, or None."""
        return refusal(self.model_extra, FIELDS)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def num_answers(self) -> int:
        """To each prompt, to be given."""
        return self.n or 1

    @property
    def num_tried(self) -> int:
        """To each prompt, of which ``num_answers`` are given."""
        return self.num_answers

    def sampling(
        self, generation_config: Any, ends: frozenset[int], grammar: Grammar | None = None
    ) -> Sampling:
        """How to choose tokens: the request's values, else the model's own where it samples, else
        temperature 1 and all tokens.

        ends : the tokens that end the answer. grammar : what it must look like.
        """

        samples, defaults = own_sampling(generation_config)

        def own(name: str, otherwise: float) -> Any:
            given = getattr(self, name)
            if given is None and samples:
                given = defaults.get(name)
            return otherwise if given is None else given

        return Sampling(
            own("temperature", 1.0),
            own("top_p", 1.0),
            max(0, own("top_k", 0)),
            self.seed,
            self.num_logprobs,
            self.min_tokens or 0,
            ends,
            grammar,
            self.min_p or 0.0,
            tuple((self.logit_bias or {}).items()),
            self.presence_penalty or 0.0,
            self.frequency_penalty or 0.0,
            self.repetition_penalty or 1.0,
        )


class TextPart(_Part):
    known = PART_FIELDS

    type: Literal["text"]
    text: StrictStr


class CalledFunction(BaseModel):
    name: StrictStr
    arguments: StrictStr | dict[str, Any]  # JSON


class ToolCall(BaseModel):
    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Arguments as an object, which most chat templates write as JSON themselves."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise ValueError(f"{self.function.name}'s arguments are no JSON: {error}") from None
        own = {"name": self.function.name, "arguments": arguments}
        return {"type": self.type, "function": own} | ({"id": self.id} if self.id else {})


class Message(_Part):
    known = MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is null or missing: give the message's text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: a {self.role} message has none")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text in one piece, developer messages as system ones."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        made: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        for name in ("name", "reasoning_content", "tool_call_id"):
            if value := getattr(self, name):
                made[name] = value
        if self.tool_calls:
            made["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return made


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None

    @property
    def callable(self) -> Tools | None:
        """What the answer may call, or None."""
        choice = self.tool_choice or "auto"
        if not self.tools or choice == "none":
            return None
        tools, kind = self.tools, choice
        if isinstance(choice, NamedChoice):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
            kind = "required"
        return Tools(tools, str(kind), self.parallel_tool_calls is not False)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refused(self) -> tuple[str, str] | None:
        if self.top_logprobs and not self.logprobs:
            return "top_logprobs", "top_logprobs needs logprobs: true"
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            return "tool_choice", "tool_choice asks for a call, and there are no tools"
        if self.callable is not None and not self.callable.tools:
            return "tool_choice", "tool_choice names a function that is not among the tools"
        return super().refused()


class CompletionRequest(_Request):
    """POST /v1/completions. max_tokens is 16 by default, as OpenAI's is."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None
    best_of: Answers | None = None
    echo: StrictBool | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens or 16

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_tried(self) -> int:
        return max(self.best_of or 1, self.num_answers)

    def refused(self) -> tuple[str, str] | None:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            return "prompt", f"prompt has {len(self.prompts)} texts: must be 1 to {MAX_PROMPTS}"
        if (self.best_of or self.num_answers) < self.num_answers:
            return "best_of", f"best_of={self.best_of}: must be at least n, {self.num_answers}"
        if self.stream and self.num_tried > self.num_answers:
            return "best_of", "best_of needs whole answers: leave out stream, or best_of"
        if self.echo and self.logprobs is not None:
            return "echo", "echo: log probabilities of prompts are not served; leave one out"
        return super().refused()

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts, or tokens."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        tokens = [token for token in given if isinstance(token, int)]
        return [tokens] if tokens else [one for one in given if not isinstance(one, int)]
