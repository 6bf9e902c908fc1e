"""uvicorn's httptools protocol with the bounds it lacks: bytes and seconds of a request on its way in, and connections.

One instance per connection, on the event loop of a gateway worker. How many bytes a body may have and when a client
is told that it is late is decided where bodies are read (bodies.py); here a connection that does not move is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from octavo.gateway.direct import WRITER

HEALTH = "/health"  # the one path that stays open to connections above the limit
MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 15.0  # from the connection, or the first byte of a later request, to the end of its headers
MESSAGE_SECONDS = 40.0  # from there to the end of the body: more than bodies.py allows, which answers before it
LINGER_SECONDS = 1.0  # for a client to read its refusal, though it still sends
SEND_BUFFER_BYTES = 32 << 10  # what the kernel keeps for a client that does not read; it takes twice that
WRITE_BUFFER_BYTES = 16 << 10  # what this process keeps before whoever writes has to wait
KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))  # seconds, seconds, times
SURPLUS = 64  # connections above the limit that are still told so

OVERFULL = b"503 Service Unavailable"
TOO_LARGE = b"431 Request Header Fields Too Large"
MALFORMED = b"400 Bad Request"


class CycleWriter:
    """Writes pieces of the body of one answer, whose headers were sent, without the turns of the event loop that
    ASGI's `send` takes (direct.Writer).
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._write = cycle.transport.write
        self.num_bytes = 0

    @property
    def writable(self) -> bool:
        cycle = self._cycle
        is_open = cycle.response_started and not cycle.response_complete and not cycle.disconnected
        return is_open and cycle.chunked_encoding is True and not cycle.flow.write_paused

    def write(self, piece: bytes) -> None:
        self.num_bytes += len(piece)
        self._write(b"%x\r\n%b\r\n" % (len(piece), piece))


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses heads above MAX_HEAD_BYTES with 431 and connections above `max_connections` with 503; closes those whose
    request does not arrive in time and, by TCP keepalive, those whose peer is gone.

    `max_connections` is set once per worker by `bounded`; 0 is no limit.
    """

    max_connections = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = False
        self._refused = False
        self._received = 0  # bytes of an unfinished head; the parser holds an unfinished header back
        self._parsed = 0  # bytes of a head's parts that were parsed
        self._timer: asyncio.TimerHandle | None = None
        surplus = len(self.connections) - self.max_connections if self.max_connections else 0
        self._is_surplus = surplus > 0
        if surplus > SURPLUS:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        _bound_socket(transport.get_extra_info("socket"))
        self._expect(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        received = self._received + len(data) if self._in_head else len(data)
        super().data_received(data)
        self._received = received
        if self._in_head and received > MAX_HEAD_BYTES:
            self._refuse(TOO_LARGE, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._parsed = 0
        if self._timer is None:
            self._expect(HEAD_SECONDS)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._parsed += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._parsed += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._expect(MESSAGE_SECONDS)
        if self._parsed > MAX_HEAD_BYTES:
            self._refuse(TOO_LARGE, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")
        elif self._is_surplus and httptools.parse_url(self.url).path.decode("latin-1") != HEALTH:
            message = f"too many connections (MAX_CONNECTIONS {self.max_connections})"
            self._refuse(OVERFULL, message, more=b"retry-after: 2\r\n")
        if not self._refused:
            super().on_headers_complete()
            if self.cycle is not None and self.cycle.scope is self.scope:  # its handler starts later
                self.scope["extensions"] = {**self.scope.get("extensions", {}), WRITER: CycleWriter(self.cycle)}

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._expect(None)
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(MALFORMED, "the request is not valid HTTP")

    def _expect(self, seconds: float | None) -> None:
        """Close the connection unless the next part of a request is whole by then; None: nothing is on its way."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

    def _refuse(self, status: bytes, message: str, *, more: bytes = b"") -> None:
        """Answer from here, read on for a moment (closing on unread data would reset the connection), close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        code = int(status[:3])
        kind = "service_unavailable_error" if code == 503 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": None}
        body = msgspec.json.encode({"error_msg": message, "error_code": code, "error": error})
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nconnection: close\r\n%s" % (status, more)
        self.transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._expect(LINGER_SECONDS)


def bounded(max_connections: int) -> type[BoundedHttpProtocol]:
    """The protocol for a worker that takes so many connections at once."""
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), {"max_connections": max_connections})


def _bound_socket(connection: socket.socket | None) -> None:
    """Notice a peer that is gone without a word, and bound what the kernel buffers for one that does not read."""
    if connection is None:
        return
    with contextlib.suppress(OSError):  # a listening socket of another kind
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
