"""Answers on the HTTP side: JSON, errors in either dialect's shape, and streams that stop when the client leaves.

Runs on the event loop of a gateway worker. Knows ASGI and the error table; what the bytes say is for the routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.gateway.bodies import NATIVE, OPENAI
from octavo.gateway.direct import Direct
from octavo.protocol.errors import Cancelled, OctavoError, Unavailable
from octavo.protocol.openai import openai_name

T = TypeVar("T")

NDJSON = {"content-type": "application/x-ndjson; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
SSE = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
SHUTTING_DOWN = Unavailable("the server is shutting down")
STALL_SECONDS = 60.0  # past its request's own time, for a reader that has stopped reading


def json_response(body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return Response(raw, status_code=status, headers=dict(headers or {}), media_type="application/json")


def openai_error(error: OctavoError) -> dict[str, object]:
    """The OpenAI error body, with the field called as OpenAI calls it."""
    shown = type(error)(error.message)
    shown.field, shown.code = openai_name(error.field), error.code
    return shown.as_openai()


def error_body(error: OctavoError, dialect: str | None, req_id: str | None = None) -> dict[str, object]:
    """The error in a dialect's shape; in both at once where the dialect is not known."""
    if dialect == OPENAI:
        return openai_error(error)
    if dialect == NATIVE:
        return error.as_native(req_id)
    return {**error.as_native(req_id), **openai_error(error)}


def error_response(error: OctavoError, dialect: str | None, req_id: str | None = None) -> Response:
    headers: dict[str, str] = {}
    if error.kind.retry_after is not None:
        headers["retry-after"] = str(error.kind.retry_after)
    if error.status in (408, 409):
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # a body may still be on its way
    return json_response(error_body(error, dialect, req_id), status=error.status, headers=headers)


async def while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """Await `work`; if the client leaves first, cancel it and raise Cancelled. Call once the body was read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("the client has left")
    finally:
        await _stop(working, watching)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they are over; what they raise is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class StreamResponse(Response):
    """Sends what a generator yields, one write each; closes the generator whatever ends it.

    It waits for the connection's write buffer (16 KiB) before it takes the next piece, so a slow reader holds up only
    its own request. A client that leaves, or stops reading beyond `seconds`, ends it.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str],
        seconds: float,
        last_words: bytes,
        direct: Direct | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(dict(headers))
        self._pieces = pieces
        self._direct = direct  # opened with the headers
        self._seconds = seconds
        self._last_words = last_words  # for a server that shuts down before the stream has ended

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        self.raw_headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(scope, send))
        watching = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, watching), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except asyncio.CancelledError:
            await _stop(sending)
            await send({"type": "http.response.body", "body": self._last_words, "more_body": False})
        finally:
            await _stop(sending, watching)
            await self._pieces.aclose()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._direct is not None:
            self._direct.open(scope)
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
