"""One client of a server of OpenAI's API: streams an answer and notes when its tokens come.

By the standard library's blocking client, a thread for each stream: what measures runs beside what
is measured, often on the same cores, so it should cost little, some 50 us a token.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ktk.errors import KtkError

TIMEOUT = 600.0  # seconds without a byte
SHOWN = 200  # characters of a server's message


class ServerError(KtkError, RuntimeError):
    """A server that does not answer, or answers with an error."""


@dataclass(frozen=True)
class Sample:
    """One answer, or why there is none. Times are of time.perf_counter, in seconds.

    first, last : when the first and the last piece of text came. end : of the connection. error :
    None if the answer is whole. prompt_tokens, output_tokens : as the server counts them; where it
    does not, 0 and the number of pieces.
    """

    start: float
    end: float
    first: float = 0.0
    last: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None where there was one only."""
        return (
            (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None
        )


class Client:
    """Of one server; may be used by many threads.

    url : of the server, with or without its last /v1. model : None asks the server for its first
    one. is_chat : whether prompts go to chat/completions, not to completions. options : more fields
    of requests. Raises ServerError, ValueError.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        is_chat: bool = False,
        options: dict[str, Any] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: must be an address as http://127.0.0.1:8000")
        kind: Callable[..., http.client.HTTPConnection] = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._connect = lambda: kind(parts.hostname, parts.port, timeout=timeout)
        self.address = f"{parts.scheme}://{parts.netloc}"
        self._base = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._is_chat, self._options = is_chat, options or {}
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        found = self._ask("GET", "models", None)
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self.address} lists no model: name one") from None

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        asked = (
            {"messages": [{"role": "user", "content": prompt}]}
            if self._is_chat
            else {"prompt": prompt}
        )
        return {"model": self.model, "max_tokens": max_tokens, **asked, **self._options}

    @property
    def _route(self) -> str:
        return "chat/completions" if self._is_chat else "completions"

    def _send(
        self, connection: http.client.HTTPConnection, method: str, route: str, body: Any
    ) -> http.client.HTTPResponse:
        """The response, once its head has come. Raises ServerError unless it is 200."""
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, f"{self._base}/{route}", data, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(f"HTTP {response.status}: {_message(response.read())}")
        return response

    def _ask(self, method: str, route: str, body: Any) -> Any:
        connection = self._connect()
        try:
            return json.loads(self._send(connection, method, route, body).read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{self.address}: {_said(error)}") from error
        finally:
            connection.close()

    def count(self, prompt: str) -> int | None:
        """Tokens of a prompt, as the server counts them; None if it does not.

        It answers with one token.
        """
        found = self._ask("POST", self._route, self._body(prompt, 1))
        counted = (found.get("usage") or {}).get("prompt_tokens")
        return int(counted) if counted else None

    def stream(self, prompt: str, max_tokens: int) -> Sample:
        """Ask, and read to the end. Whatever fails is in the sample."""
        body = self._body(prompt, max_tokens)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        connection = self._connect()
        try:
            return self._read(start, self._send(connection, "POST", self._route, body))
        except ServerError as error:
            return Sample(start, time.perf_counter(), error=str(error))
        except (OSError, http.client.HTTPException, ValueError) as error:
            return Sample(start, time.perf_counter(), error=_said(error))
        finally:
            connection.close()

    def _read(self, start: float, response: http.client.HTTPResponse) -> Sample:
        first = last = 0.0
        pieces, usage, is_whole = 0, dict[str, Any](), False
        for line in response:
            now = time.perf_counter()
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                is_whole = True
                break
            event = json.loads(data)
            if error := event.get("error"):
                raise ServerError(_message(json.dumps({"error": error}).encode()))
            usage = event.get("usage") or usage
            if any(map(_text, event.get("choices") or ())):
                first, last, pieces = first or now, now, pieces + 1
        end = time.perf_counter()
        if not is_whole:
            return Sample(start, end, error="the stream broke off")
        if not pieces:
            return Sample(start, end, error="an answer without text")
        counted = usage.get("completion_tokens") or pieces
        return Sample(start, end, first, last, usage.get("prompt_tokens") or 0, counted)


def _text(choice: dict[str, Any]) -> str:
    """What a chunk's choice adds to the answer, or to what the model thinks."""
    delta = choice.get("delta") or {}
    found = (choice.get("text"), *map(delta.get, ("content", "reasoning_content", "reasoning")))
    return next(filter(None, found), "")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:SHOWN]


def _message(body: bytes) -> str:
    """Of an error's body, in whichever of the usual places."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        return str(found.get("message", found) if isinstance(found, dict) else found)[:SHOWN]
    except (ValueError, AttributeError):
        return body.decode(errors="replace").strip()[:SHOWN] or "no text"
