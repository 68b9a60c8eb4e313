"""The routes: OpenAI's chat and plain completions and models, and health, metrics,
a description, the chat page.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktk import __version__
from ktk.generate.engine import Engine, RequestError, ServerBusy
from ktk.generate.grammar import Grammar, Grammars
from ktk.generate.open import OpenModel
from ktk.generate.text import stop_tokens
from ktk.integration.transformers.expert_statistics import ExpertStatistics
from ktk.integration.transformers.tokens import Spelling, encode, encode_chat, vocabulary_size
from ktk.server import distribution, page
from ktk.server.answer import Answer, Stop
from ktk.server.forms import Chat, Completion, Form, error_body
from ktk.server.metrics import Metrics
from ktk.server.protocol import ChatRequest, CompletionRequest
from ktk.server.state import State
from ktk.server.watch import ExpertWatch

CLIENT_GONE = 499  # nginx' code; nobody reads the response, but metrics count it
OPEN_PATHS = ("/", "/health")  # served without a key
_NO_FIELD = re.compile(
    r"body|str|list\[.*\]"
)  # pydantic's names of the kinds that a field may have
T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """Who may do what. api_key : None lets everybody in. max_body_bytes : of a request.

    hosts : values of the Host header to answer, None for all: keeps web pages of other names that
    resolve to this machine out. cors_origins : web origins whose pages may call this server.
    """

    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(error_body(message, kind, param, code), status)


class _Guard:
    """ASGI middleware: refuses requests without the key, and bodies that are too large."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and not self._is_authorised(headers):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            refusal = _error(401, message, code="invalid_api_key")
            refusal.headers["www-authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        limit = self._access.max_body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            await _too_large(limit)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:  # sent in chunks, without a length
                raise HTTPException(413, _too_large_text(limit))
            return message

        await self.app(scope, counted, send)

    def _is_authorised(self, headers: dict[bytes, bytes]) -> bool:
        key = self._access.api_key
        if key is None:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(given.strip(), key.encode()) and kind.lower() == b"bearer"


def _too_large_text(limit: int) -> str:
    return f"the request's body is too large: at most {limit} bytes"


def _too_large(limit: int) -> Response:
    return _error(413, _too_large_text(limit))


class _Gone(Exception):
    """The client has closed its connection."""


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, cancelled with _Gone if the client goes away before."""
    result: list[T] = []
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result.append(await work)
        except Exception as error:  # out of the group it would come as an ExceptionGroup
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not result:
        raise _Gone
    return result[0]


class _EventStream(StreamingResponse):
    """Server-sent events whose source is closed at once when the client goes away,
    even while it waits for a token.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], gone: Callable[[], None]) -> None:
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events, self._gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = False
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            async with aclosing(self._events):  # type: ignore[type-var]
                try:
                    await self.stream_response(send)
                    complete = True
                except OSError:  # the connection broke while something was sent
                    pass
            group.cancel_scope.cancel()
        if not complete:
            self._gone()


class _Service:
    """What the routes of one app share."""

    def __init__(self, opened: OpenModel, engine: Engine, metrics: Metrics) -> None:
        self.opened, self.engine, self.metrics = opened, engine, metrics
        self.tokenizer = opened.tokenizer
        self.spelling = Spelling(opened.tokenizer)
        self.created = int(time.time())
        self._grammars = Grammars(self.tokenizer, vocabulary_size(opened.model), engine.eos)

    def model_row(self) -> dict[str, Any]:
        return {
            "id": self.opened.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ktk",
            "max_model_len": self.engine.limits.context,
        }

    async def answer(self, request: ChatRequest | CompletionRequest) -> Answer:
        """Checks a request and tokenises its prompt. Raises RequestError, HTTPException."""
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
        ids = await asyncio.to_thread(self._encode, request)
        limit = self.engine.check(len(ids), request.limit)
        if (request.min_tokens or 0) > limit:
            raise RequestError(
                f"min_tokens={request.min_tokens}: the answer may have {limit} tokens; ask for "
                "fewer",
                "min_tokens",
            )
        stop = self._stop(request)
        own = frozenset() if request.ignore_eos else frozenset(self.engine.eos)
        grammar = await asyncio.to_thread(self._grammar, request)
        sampling = request.sampling(self.engine.model.generation_config, own | stop.tokens, grammar)
        return Answer(self.engine, self.metrics, ids, sampling, limit, stop)

    def _grammar(self, request: ChatRequest | CompletionRequest) -> Grammar | None:
        asked = request.form()
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

    def _stop(self, request: ChatRequest | CompletionRequest) -> Stop:
        asked = request.stop_token_ids or []
        self._check_tokens("stop_token_ids", asked)
        try:
            tokens, strings = stop_tokens(self.tokenizer, request.stops)
        except ValueError as error:
            raise RequestError(str(error), "stop") from error
        return Stop(strings, tokens | set(asked), bool(request.include_stop_str_in_output))

    def _check_tokens(self, name: str, tokens: list[int]) -> None:
        vocabulary = vocabulary_size(self.engine.model)
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise RequestError(
                f"{name} has the token {wrong[0]}: must be 0 to {vocabulary - 1}", name
            )

    def _encode(self, request: ChatRequest | CompletionRequest) -> list[int]:
        try:
            if isinstance(request, ChatRequest):
                if not self.tokenizer.chat_template:
                    raise RequestError(
                        f"{self.opened.name} has no chat template: use /v1/completions, which "
                        "continues text"
                    )
                return encode_chat(self.tokenizer, [m.for_template() for m in request.messages])
            if request.text is not None:
                return encode(self.tokenizer, request.text)
        except ValueError as error:
            raise RequestError(str(error)) from error
        self._check_tokens("prompt", request.tokens)
        return request.tokens


def build_app(
    opened: OpenModel, engine: Engine, access: Access, recorder_mode: str = "stat"
) -> FastAPI:
    """The ASGI application for a model whose engine has been started.

    recorder_mode : of ``ktk.placement.masks.recorder.MODES``.
    """
    metrics = Metrics(engine, opened.name, opened.residency)
    service = _Service(opened, engine, metrics)
    state = State(opened, engine, metrics)
    app = FastAPI(title="ktk", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard, access=access)
    if access.cors_origins:  # outside the guard: a preflight request brings no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    if access.hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts))
    document = page.document()

    def counted(request: Request, status: int) -> None:
        route = request.scope.get("route")
        metrics.requests.labels(getattr(route, "path", "unknown"), str(status)).inc()

    def failed(request: Request, response: Response) -> Response:
        counted(request, response.status_code)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return failed(request, _invalid(error))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return failed(request, _error(400, str(error), error.param))

    @app.exception_handler(ServerBusy)
    async def busy(request: Request, error: ServerBusy) -> Response:
        response = _error(503, str(error))
        response.headers["retry-after"] = "5"
        return failed(request, response)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = "model_not_found" if error.status_code == 404 and "model" in error.detail else None
        return failed(request, _error(error.status_code, error.detail, code=code))

    @app.exception_handler(_Gone)
    async def gone(request: Request, error: _Gone) -> Response:
        return failed(request, Response(status_code=CLIENT_GONE))

    # What nobody expected is logged with its traceback by uvicorn, and still is JSON to the client.
    @app.exception_handler(Exception)
    @app.exception_handler(RuntimeError)
    async def broken(request: Request, error: Exception) -> Response:
        return failed(request, _error(500, str(error) or type(error).__name__))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        answer = await service.answer(body)
        return await respond(body, request, answer, Chat(opened.name, service.spelling, body))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        answer = await service.answer(body)
        return await respond(body, request, answer, Completion(opened.name, service.spelling, body))

    async def respond(
        body: ChatRequest | CompletionRequest, request: Request, answer: Answer, form: Form
    ) -> Response:
        if not body.stream:
            result = await _unless_gone(request, form.whole(answer))
            counted(request, 200)
            return JSONResponse(result)
        # The first piece decides whether this is an error, with its own status, or a stream.
        pieces = answer.pieces()
        events = form.events(pieces, answer)
        first = await _unless_gone(request, anext(events))
        counted(request, 200)
        gone_later = metrics.requests.labels(request.scope["route"].path, str(CLIENT_GONE)).inc
        return _EventStream(_after(first, events), gone_later)

    recording, own = (_statistics(opened.model, mode) for mode in (recorder_mode, "stat"))
    watch = ExpertWatch(recording, None if isinstance(own, str) else own)
    distribution.add_routes(app, recording, watch, access.cors_origins, counted)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.model_row()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != opened.name:
            raise HTTPException(
                404, f"the model {name!r:.200} is not served here: only {opened.name!r} is"
            )
        return JSONResponse(service.model_row())

    @app.get("/v1/ktk")
    async def info() -> Response:
        return JSONResponse(state.to_json())

    @app.get("/health")
    async def health() -> Response:
        if engine.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine has stopped"}, 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(
            document,
            headers={
                "content-security-policy": page.POLICY,
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
                "cache-control": "no-cache",
            },
        )

    return app


def _statistics(model: Any, mode: str) -> ExpertStatistics | str:
    """Of the model, or why there are none."""
    try:
        return ExpertStatistics(model, mode)
    except ValueError as error:
        return str(error)


def _invalid(error: RequestValidationError) -> Response:
    """What pydantic found, in one line: the field, and why."""
    # Where a field may be of several kinds, each has its error: the innermost one is of the kind
    # that was meant.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    where = ".".join(part for part in map(str, first["loc"]) if not _NO_FIELD.fullmatch(part))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not JSON")
        return _error(400, f"the body is not valid JSON: {reason} at character {where}")
    if not where:
        return _error(
            400, f"the body must be a JSON object, sent as application/json: {first['msg']}"
        )
    return _error(400, f"{where}: {first['msg'].removeprefix('Value error, ')}", param=where)


async def _after(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for event in rest:
            yield event
