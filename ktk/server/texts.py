"""Routes that make no answer: texts as tokens and back, with vLLM's names, and texts as vectors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Annotated, Literal, Self

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from ktk.generate.engine import RequestError
from ktk.integration.transformers.tokens import encode, encode_chat
from ktk.server.connection import unless_gone
from ktk.server.metrics import Metrics
from ktk.server.protocol import Message
from ktk.server.service import Service

MOST_INPUTS = 256  # of one request for embeddings


class _Asked(BaseModel):
    """A field that is not here is a 400."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None


class TokenizeRequest(_Asked):
    """POST /tokenize. add_special_tokens : those the tokenizer puts around a text; of messages,
    beside the template's.
    """

    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool = True
    return_token_strs: StrictBool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt, or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens: the template adds what messages need")
        return self


class DetokenizeRequest(_Asked):
    """POST /detokenize."""

    tokens: list[StrictInt]


class EmbeddingRequest(_Asked):
    """POST /v1/embeddings."""

    input: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    user: StrictStr | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """One for each vector."""
        given = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)  # type: ignore[arg-type]


def add_routes(
    app: FastAPI, service: Service, metrics: Metrics, counted: Callable[[Request, int], None]
) -> None:
    """counted : told of each answer's status."""
    opened, engine, tokenizer = service.opened, service.engine, service.tokenizer

    def as_tokens(body: TokenizeRequest) -> list[int]:
        try:
            if body.messages is None:
                is_whole = body.add_special_tokens is not False
                return encode(tokenizer, body.prompt or "", is_whole)
            if not tokenizer.chat_template:
                raise RequestError(f"{opened.name} has no chat template: give a prompt", "messages")
            messages = [message.for_template() for message in body.messages]
            return encode_chat(tokenizer, messages, body.add_generation_prompt)
        except ValueError as error:
            raise RequestError(str(error)) from error

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        tokens = await asyncio.to_thread(as_tokens, body)
        texts = tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        counted(request, 200)
        return JSONResponse(
            {
                "count": len(tokens),
                "max_model_len": engine.limits.context,
                "tokens": tokens,
                "token_strs": texts,
            }
        )

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        service.check_tokens("tokens", body.tokens)
        text = await asyncio.to_thread(tokenizer.decode, body.tokens)
        counted(request, 200)
        return JSONResponse({"prompt": text})

    def as_input(given: str | list[int]) -> list[int]:
        try:
            tokens = encode(tokenizer, given) if isinstance(given, str) else given
        except ValueError as error:
            raise RequestError(str(error), "input") from error
        service.check_tokens("input", tokens)
        engine.check(len(tokens), 1)
        return tokens

    async def vectors(inputs: list[list[int]]) -> list[torch.Tensor]:
        """Of many inputs no more at once than the engine runs."""
        room = asyncio.Semaphore(engine.limits.running)

        async def vector(tokens: list[int]) -> torch.Tensor:
            async with room:
                return await engine.embed(tokens)

        tasks = [asyncio.create_task(vector(tokens)) for tokens in inputs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # of one that fails the others
                task.cancel()

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        texts = body.inputs
        if not 1 <= len(texts) <= MOST_INPUTS:
            raise RequestError(f"input has {len(texts)} texts: must be 1 to {MOST_INPUTS}", "input")
        inputs = await asyncio.to_thread(lambda: list(map(as_input, texts)))
        metrics.prompt_tokens.inc(sum(map(len, inputs)))
        found = await unless_gone(request, vectors(inputs))
        size = len(found[0])
        if body.dimensions not in (None, size):
            raise RequestError(
                f"dimensions={body.dimensions}: this model's vectors have {size}", "dimensions"
            )
        counted(request, 200)
        total = sum(map(len, inputs))
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {
                        "object": "embedding",
                        "index": index,
                        "embedding": _shown(vector, body.encoding_format),
                    }
                    for index, vector in enumerate(found)
                ],
                "model": opened.name,
                "usage": {"prompt_tokens": total, "total_tokens": total},
            }
        )


def _shown(hidden: torch.Tensor, encoding: str) -> str | list[float]:
    """Of length 1; little-endian float32 in base64, or numbers."""
    vector = hidden.double().numpy()
    vector = (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype("<f4")
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
