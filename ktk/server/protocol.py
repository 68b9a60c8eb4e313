"""The OpenAI API's requests, as far as this server serves them: checked,
with what is not served refused (``fields.py``).
"""

from __future__ import annotations

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

MAX_STOP = 16
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64

Temperature = Annotated[float, Field(ge=0, le=2, strict=True)]
Probability = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
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
        )


class TextPart(_Part):
    known = PART_FIELDS

    type: Literal["text"]
    text: StrictStr


class Message(_Part):
    known = MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, content: Any) -> Any:
        if content is None:
            raise ValueError(
                "is null, as with tool calls, which are not served here: give the message's text"
            )
        return content

    def for_template(self) -> dict[str, str]:
        """As chat templates take it: text in one piece, developer messages as system ones."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refused(self) -> tuple[str, str] | None:
        if self.top_logprobs and not self.logprobs:
            return "top_logprobs", "top_logprobs needs logprobs: true"
        return super().refused()


class CompletionRequest(_Request):
    """POST /v1/completions. max_tokens is 16 by default, as OpenAI's is."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens or 16

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def refused(self) -> tuple[str, str] | None:
        texts = [text for text in self.prompt if isinstance(text, str)]
        if isinstance(self.prompt, list) and len(texts) > 1:
            return "prompt", f"prompt has {len(texts)} texts: send one request for each"
        return super().refused()

    @property
    def text(self) -> str | None:
        """The prompt's text, or None where it is given in tokens."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0] if self.prompt else ""
        return first if isinstance(first, str) else None

    @property
    def tokens(self) -> list[int]:
        """The prompt's tokens, where it is given in tokens."""
        return [token for token in self.prompt if isinstance(token, int)]
