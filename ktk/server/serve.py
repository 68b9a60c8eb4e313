"""Running the server: uvicorn, and an end that leaves no stream hanging."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType

import uvicorn

from ktk.generate.engine import Engine
from ktk.generate.open import OpenModel
from ktk.server.app import Access, build_app


class _Server(uvicorn.Server):
    """On the first signal, streams get ``grace`` seconds to finish;
    then they end where they are, with a last chunk.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self._engine, self._grace = engine, grace
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(
                self._loop.call_later, self._grace, self._engine.end_all
            )
        super().handle_exit(sig, frame)


def serve(
    opened: OpenModel,
    engine: Engine,
    host: str,
    port: int,
    access: Access,
    grace: float = 2.0,
    recorder_mode: str = "stat",
) -> None:
    """Serve a model by a started engine until SIGINT or SIGTERM, and stop the engine.

    recorder_mode : as in ``build_app``.
    """
    try:
        config = uvicorn.Config(
            build_app(opened, engine, access, recorder_mode),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(grace) + 3,
        )
        # uvicorn raises the signal again once it has ended; by then that is no news.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        _Server(config, engine, grace).run()
    finally:
        engine.stop()
