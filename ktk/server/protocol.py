"""The OpenAI API's requests, as far as this server serves them: checked, with what would change the answer and is not served refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator

from ktk.integration.transformers.sampling import Sampling

MAX_STOP = 16
MAX_LOGPROBS = 20

Temperature = Annotated[float, Field(ge=0, le=2, strict=True)]
Probability = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
# Seeds are 64 bits there; a generator of torch takes those.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]

# Fields whose values other than these would change the answer.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class _Request(BaseModel):
    """What chat and plain completions share. Unknown fields are ignored, as OpenAI's clients send many."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, strict=True)] | None = None
    seed: Seed | None = None
    stop: StrictStr | list[StrictStr] | None = None

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
        for name, value in (self.model_extra or {}).items():
            if name in NOT_SERVED and value is not None and value not in NOT_SERVED[name]:
                allowed = ", ".join(map(repr, NOT_SERVED[name]))
                only = f"only {allowed} is" if allowed else "it is"
                return (
                    name,
                    f"{name}={value!r:.80}: {only} {'' if allowed else 'not '}served here; leave it out",
                )
        return None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling(self, generation_config: Any) -> Sampling:
        """How to choose tokens: the request's values, else the model's own where it samples, else temperature 1 and all tokens."""

        def own(name: str, otherwise: float) -> Any:
            given = getattr(self, name)
            if given is None and generation_config.do_sample:
                given = getattr(generation_config, name, None)
            return otherwise if given is None else given

        return Sampling(
            own("temperature", 1.0),
            own("top_p", 1.0),
            own("top_k", 0),
            self.seed,
            self.num_logprobs,
        )


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]

    def for_template(self) -> dict[str, str]:
        """As chat templates take it: text in one piece, developer messages as system ones."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


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
    max_tokens: Count = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens

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
