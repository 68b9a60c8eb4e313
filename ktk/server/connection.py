"""Work for a client, which ends at once when the client goes away."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

log = logging.getLogger("ktk")
T = TypeVar("T")


class Gone(Exception):
    """The client has closed its connection."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, cancelled with Gone if the client goes away before."""
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
        raise Gone
    return result[0]


class EventStream(StreamingResponse):
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


async def joined(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for event in rest:
            yield event


async def guarded(events: AsyncIterator[str], failed: Callable[[str], str]) -> AsyncIterator[str]:
    """Events, of which only the first may raise; failed : the last one, by what broke the rest."""
    has_begun = False
    try:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield event
                has_begun = True
    except Exception as error:  # the engine's: the stream has begun with 200
        if not has_begun:
            raise
        log.exception("an answer's stream failed")
        yield failed(str(error) or type(error).__name__)


class Respond(Protocol):
    """Sends what is awaited as JSON, or events as they come; counts the request.

    failed : the last event of a stream that broke, by why.
    """

    def __call__(
        self,
        request: Request,
        whole: Awaitable[dict[str, Any]] | None,
        events: AsyncIterator[str] | None,
        failed: Callable[[str], str],
        /,
    ) -> Awaitable[Response]: ...
