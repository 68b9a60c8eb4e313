"""The routes: OpenAI's chat and plain completions and models, and health, metrics,
a description, the chat page. Those of other APIs are in files of their own.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktk import __version__
from ktk.generate.engine import Engine, RequestError, ServerBusy
from ktk.generate.open import OpenModel
from ktk.integration.transformers.expert_statistics import ExpertStatistics
from ktk.server import distribution, messages, page, responses, texts
from ktk.server.answer import Answers
from ktk.server.connection import EventStream, Gone, guarded, joined, unless_gone
from ktk.server.forms import Form, error_body
from ktk.server.metrics import Metrics
from ktk.server.protocol import ChatRequest, CompletionRequest
from ktk.server.service import Service
from ktk.server.state import State
from ktk.server.watch import ExpertWatch

CLIENT_GONE = 499  # nginx' code; nobody reads the response, but metrics count it
OPEN_PATHS = ("/", "/health")  # served without a key
_NO_FIELD = re.compile(
    r"body|str|list\[.*\]"
)  # pydantic's names of the kinds that a field may have


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
        if (own := headers.get(b"x-api-key")) is not None:  # Anthropic's clients send it so
            return hmac.compare_digest(own.strip(), key.encode())
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(given.strip(), key.encode()) and kind.lower() == b"bearer"


def _too_large_text(limit: int) -> str:
    return f"the request's body is too large: at most {limit} bytes"


def _too_large(limit: int) -> Response:
    return _error(413, _too_large_text(limit))


def build_app(
    opened: OpenModel, engine: Engine, access: Access, recorder_mode: str = "stat"
) -> FastAPI:
    """The ASGI application for a model whose engine has been started.

    recorder_mode : of ``ktk.placement.masks.recorder.MODES``.
    """
    metrics = Metrics(engine, opened.name, opened.residency)
    service = Service(opened, engine, metrics)
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

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return failed(request, Response(status_code=CLIENT_GONE))

    # What nobody expected is logged with its traceback by uvicorn, and still is JSON to the client.
    @app.exception_handler(Exception)
    @app.exception_handler(RuntimeError)
    async def broken(request: Request, error: Exception) -> Response:
        return failed(request, _error(500, str(error) or type(error).__name__))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        answers = await service.answers(body)
        readers = service.readers(body, answers)
        form = Form.of_chat(opened.name, service.spelling, body, readers)
        return await respond(body, request, answers, form)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        answers = await service.answers(body)
        echoes = service.echoes(body)
        form = Form.of_completion(opened.name, service.spelling, body, echoes)
        return await respond(body, request, answers, form)

    async def respond(
        body: ChatRequest | CompletionRequest, request: Request, answers: Answers, form: Form
    ) -> Response:
        if not body.stream:
            return await send(request, form.whole(answers), None, Form.failed)
        return await send(request, None, form.events(answers), Form.failed)

    async def send(
        request: Request,
        whole: Awaitable[dict[str, Any]] | None,
        given: AsyncIterator[str] | None,
        failed: Callable[[str], str],
    ) -> Response:
        if given is None:
            assert whole is not None
            result = await unless_gone(request, whole)
            counted(request, 200)
            return JSONResponse(result)
        # The first piece decides whether this is an error, with its own status, or a stream.
        events = guarded(given, failed)
        first = await unless_gone(request, anext(events))
        counted(request, 200)
        gone_later = metrics.requests.labels(request.scope["route"].path, str(CLIENT_GONE)).inc
        return EventStream(joined(first, events), gone_later)

    recording, own = (_statistics(opened.model, mode) for mode in (recorder_mode, "stat"))
    watch = ExpertWatch(recording, None if isinstance(own, str) else own)
    distribution.add_routes(app, recording, watch, access.cors_origins, counted)

    messages.add_routes(app, service, send)
    responses.add_routes(app, service, send)
    texts.add_routes(app, service, metrics, counted)

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
