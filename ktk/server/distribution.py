"""Routes that record how often experts are used, with SGLang's names: start, stop, dump; and one
that shows it live.

They take no body, so a page of another site could post to them without asking: what has an Origin
is let in only if its pages may call the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ktk.generate.engine import RequestError
from ktk.integration.transformers.expert_statistics import ExpertStatistics
from ktk.server.watch import ExpertWatch

ROUTES = {action: f"/{action}_expert_distribution_record" for action in ("start", "stop", "dump")}


def add_routes(
    app: FastAPI,
    statistics: ExpertStatistics | str,
    watch: ExpertWatch,
    origins: tuple[str, ...],
    counted: Callable[[Request, int], None],
) -> None:
    """statistics : a string says why the model cannot be recorded. watch : who counts while nothing
    is recorded. origins : of pages that may call. counted : told of each answer's status.
    """

    def recorder(request: Request) -> ExpertStatistics:
        origin = request.headers.get("origin")
        if origin is not None and origin not in origins:
            raise HTTPException(403, f"pages of {origin:.200} may not call this server")
        if isinstance(statistics, str):
            raise RequestError(statistics)
        return statistics

    def done(request: Request, text: str) -> Response:
        counted(request, 200)
        return PlainTextResponse(f"{text}\n")

    @app.post(ROUTES["start"])
    async def start(request: Request) -> Response:
        recording = recorder(request)
        watch.release()
        recording.start()
        return done(request, "Start recording the expert distribution.")

    @app.get("/v1/ktk/experts")
    async def experts() -> Response:
        return JSONResponse(watch.look())

    @app.post(ROUTES["stop"])
    async def stop(request: Request) -> Response:
        recording = recorder(request)
        watch.release()
        recording.stop()
        return done(request, "Stop recording the expert distribution.")

    @app.post(ROUTES["dump"])
    async def dump(request: Request) -> Response:
        try:
            path = await asyncio.to_thread(recorder(request).dump)
        except ValueError as error:
            raise RequestError(str(error)) from error
        return done(request, f"Done dump expert distribution record: {path}")
