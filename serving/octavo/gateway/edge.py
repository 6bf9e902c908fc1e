"""The outermost ASGI layer: request ids, API keys, errors that nobody else answers, one log line per finished
request.

Pure ASGI, so that disconnects reach the handlers. Runs on the event loop of a gateway worker. Knows paths and headers
only; bodies never pass through here and no text of a request is logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.gateway.bodies import OPENAI
from octavo.gateway.direct import WRITER
from octavo.gateway.page import routes as page
from octavo.gateway.responses import SHUTTING_DOWN, error_response
from octavo.protocol.errors import InternalError, OctavoError, Unauthorized

log = logging.getLogger("octavo.gateway")

KEY_NAME = "octavo.key"  # in the ASGI scope: a name of the API key, if keys are asked for
OPEN_PATHS = frozenset({"/health"}) | page.OPEN_PATHS
_UNSAFE = re.compile(r"[^A-Za-z0-9._:\-]")
_MAX_ID = 128


class Edge:
    """Wraps the application; see the module's docstring."""

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...], new_id: Callable[[], str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = _UNSAFE.sub("", headers.get("x-request-id", ""))[:_MAX_ID] or self._new_id()
        exchange = Exchange(send, request_id)
        start = time.perf_counter()
        try:
            await self._handle(scope, receive, exchange, headers)
        finally:
            _log(scope, exchange, seconds=time.perf_counter() - start)

    async def _handle(self, scope: Scope, receive: Receive, exchange: Exchange, headers: dict[str, str]) -> None:
        dialect = OPENAI if scope["path"].startswith("/v1/chat/completions/") else None
        try:
            if self._digests and scope["path"] not in OPEN_PATHS:
                scope[KEY_NAME] = self._name_of_key(headers)
            await self._app(scope, receive, exchange.send)
        except OctavoError as error:
            await exchange.fail(error, dialect, scope, receive)
        except asyncio.CancelledError:  # the time to drain is over
            await exchange.fail(SHUTTING_DOWN, dialect, scope, receive)
        except Exception:  # the gateway's edge: whatever happens becomes an answer, and a line to find it by
            log.exception("request %s failed", exchange.request_id)
            internal = InternalError(f"internal error; the server's log has it under {exchange.request_id}")
            await exchange.fail(internal, dialect, scope, receive)

    def _name_of_key(self, headers: dict[str, str]) -> str:
        """What requests under this key have in common. Constant time: every key is compared, by digests of equal
        length. Raises Unauthorized.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip()]
        digests = [hashlib.sha256(key.encode("latin-1")).digest() for key in given]
        matches = [known for known in self._digests for one in digests if hmac.compare_digest(one, known)]
        if not matches:
            raise Unauthorized("a valid API key is needed: Authorization: Bearer <key>", code="invalid_api_key")
        return matches[0].hex()[:32]


class Exchange:
    """One answer on its way out: adds the request id, remembers how far it has come."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0
        self.num_bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        else:
            self.num_bytes += len(message.get("body", b""))
        await self._send(message)

    async def fail(self, error: OctavoError, dialect: str | None, scope: Scope, receive: Receive) -> None:
        """Answer with the error unless an answer has begun; a begun one is cut off, which clients notice."""
        if not self.status:
            await error_response(error, dialect)(scope, receive, self.send)


def _log(scope: Scope, exchange: Exchange, *, seconds: float) -> None:
    """One line per request; probes are of no interest."""
    path = scope["path"][:128].encode("unicode_escape").decode()
    level = logging.DEBUG if path in OPEN_PATHS else logging.INFO
    writer = scope.get("extensions", {}).get(WRITER)
    num_bytes = exchange.num_bytes + (writer.num_bytes if writer is not None else 0)
    shown = (scope["method"], path, exchange.status, num_bytes, seconds, exchange.request_id)
    log.log(level, "%s %s %d %d B %.3f s %s", *shown)
