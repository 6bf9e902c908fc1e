"""uvicorn's httptools protocol with the bounds it lacks: bytes and seconds for a request's head.

One instance per connection, on the event loop of a gateway worker. Bodies are bounded where they are read (bodies.py).
"""

from __future__ import annotations

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 15.0  # from the connection, or the first byte of a later request, to the end of its headers


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head above MAX_HEAD_BYTES and closes connections whose head does not arrive in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = False
        self._refused = False
        self._received = 0  # bytes of an unfinished head; the parser holds an unfinished header back
        self._parsed = 0  # bytes of a head's parts that were parsed
        self._timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        received = self._received + len(data) if self._in_head else len(data)
        super().data_received(data)
        self._received = received
        if self._in_head and received > MAX_HEAD_BYTES:
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._parsed = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._parsed += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._parsed += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self._head_arrived()
        if self._parsed > MAX_HEAD_BYTES:
            self._refuse()
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._overdue)

    def _head_arrived(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._timer = None
        self.transport.close()

    def _refuse(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        message = f"the request's head is larger than {MAX_HEAD_BYTES} bytes"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = msgspec.json.encode({"error_msg": message, "error_code": 431, "error": error})
        head = (
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
        )
        self.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        self.transport.close()
