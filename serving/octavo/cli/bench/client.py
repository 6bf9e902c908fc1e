"""A lean HTTP/1.1 client for streams: one asyncio protocol per connection, kept for the next request.

It costs a fraction of a general client's CPU, which matters because the load generator often shares the machine with
the server. Every line of a body gets the time at which its last byte arrived. No proxies, no redirects, no HTTP/2.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

OnLine = Callable[[bytes, float], None]  # a line without its end; when it arrived
MAX_ERROR_BODY = 1 << 20


class Unreachable(ConnectionError):
    """No connection could be made."""


class Cut(ConnectionError):
    """The connection ended, or made no sense, before the answer was complete."""


@dataclass(frozen=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    tls: bool
    base: str  # path in front of the routes, without a slash at its end

    @classmethod
    def parse(cls, url: str) -> Address:
        """Of http(s)://host[:port][/path]; a /v1 at the end is dropped. ValueError, one sentence."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: give http://host:port or https://host:port")
        tls = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, base)

    def __str__(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.host}:{self.port}{self.base}"


@dataclass(slots=True)
class Answer:
    """The status, and the whole body where it is not 200."""

    status: int
    body: bytes = b""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.reusable = True
        self.answered = False  # a byte of the current answer has come
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._reset()

    def _reset(self) -> None:
        self._buffer = bytearray()  # bytes not understood yet
        self._line = bytearray()  # the body's last line, not ended yet
        self._answer: Answer | None = None  # once the head is read
        self._left = 0  # of the body or the chunk; -1: until the connection ends
        self._chunked = False
        self.answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, request: bytes, on_line: OnLine) -> asyncio.Future[Answer]:
        """Send one request; the future has the answer once it is complete, or raises Cut."""
        assert self._transport is not None
        self._reset()
        self._on_line = on_line
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.answered = True
        self._buffer += data
        try:
            if self._answer is None and not self._read_head():
                return
            self._read_body(now)
        except ValueError as error:
            self._fail(f"the answer is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._done is None or self._done.done():
            return
        if self._answer is not None and self._left == -1 and exc is None:
            self._finish(time.monotonic())
        else:
            self._fail(str(exc) if exc else "the connection was closed before the end of the answer")

    def _fail(self, text: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Cut(text))
        self.close()

    def _finish(self, now: float) -> None:
        assert self._answer is not None
        assert self._done is not None
        if self._line:
            self._take(b"\n", now)
        if not self._done.done():
            self._done.set_result(self._answer)

    def _read_head(self) -> bool:
        """True once the head is complete."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *fields = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, status, *_ = first.split(" ", 2)
        if not version.startswith("HTTP/1."):
            raise ValueError(first[:40])
        headers = {name.strip().lower(): value.strip() for name, _, value in (text.partition(":") for text in fields)}
        self._answer = Answer(int(status))
        if int(status) == 100:
            self._answer = None
            return bool(self._buffer) and self._read_head()
        if headers.get("connection", "").lower() == "close" or version == "HTTP/1.0":
            self.reusable = False
        self._chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        self._left = 0 if self._chunked else int(headers.get("content-length", -1))
        return True

    def _read_body(self, now: float) -> None:
        if self._chunked:
            self._read_chunks(now)
            return
        part = bytes(self._buffer)
        self._buffer.clear()
        self._take(part, now)
        if self._left >= 0:
            self._left -= len(part)
            if self._left <= 0:
                self._finish(now)

    def _read_chunks(self, now: float) -> None:
        """Chunks from the buffer as far as they are complete; `_left` is what is missing of the current one."""
        buffer, at = self._buffer, 0
        while at < len(buffer):
            if self._left:
                part = bytes(buffer[at : at + self._left])
                at += len(part)
                self._left -= len(part)
                self._take(part, now)
                continue
            if buffer.startswith(b"\r\n", at):  # the end of the chunk before
                at += 2
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            size = int(bytes(buffer[at:end]).split(b";")[0], 16)
            if size == 0:
                if buffer.find(b"\r\n\r\n", end) < 0:
                    break  # the trailer is not complete
                buffer.clear()
                self._finish(now)
                return
            self._left, at = size, end + 2
        del buffer[:at]

    def _take(self, part: bytes, now: float) -> None:
        """Some of the body."""
        assert self._answer is not None
        if self._answer.status != 200:
            self._answer.body += part[: MAX_ERROR_BODY - len(self._answer.body)]
            return
        if b"\n" not in part:
            self._line += part
            return
        *whole, rest = (bytes(self._line) + part).split(b"\n")
        self._line = bytearray(rest)
        for line in whole:
            if line and line != b"\r":
                self._on_line(line.rstrip(b"\r"), now)


class Http:
    """Connections to one server."""

    def __init__(self, address: Address, *, api_key: str | None = None, insecure: bool = False) -> None:
        self.address = address
        self._idle: list[Connection] = []
        self._tls = _context(insecure) if address.tls else None
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._fields = f"Host: {address.host}:{address.port}\r\n{key}Accept: */*\r\nUser-Agent: octavo-bench\r\n"

    async def connect(self) -> Connection:
        """Raises Unreachable."""
        loop = asyncio.get_running_loop()
        where = (self.address.host, self.address.port)
        try:
            _, connection = await loop.create_connection(Connection, *where, ssl=self._tls)
        except OSError as error:  # ssl.SSLError is one
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
            raise Unreachable(f"cannot reach {self.address}: {why}") from None
        return connection

    async def post(self, path: str, body: bytes, on_line: OnLine) -> Answer:
        """Raises Unreachable or Cut. Cancelling closes the connection, which cancels the request."""
        head = f"POST {self.address.base}{path} HTTP/1.1\r\n{self._fields}"
        return await self._exchange(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body, on_line
        )

    async def get(self, path: str) -> Answer:
        """The whole answer. Raises Unreachable or Cut."""
        lines: list[bytes] = []
        request = f"GET {self.address.base}{path} HTTP/1.1\r\n{self._fields}\r\n".encode()
        answer = await self._exchange(request, lambda line, now: lines.append(line))
        return Answer(answer.status, answer.body or b"\n".join(lines))

    async def _exchange(self, request: bytes, on_line: OnLine) -> Answer:
        while True:
            kept = self._idle.pop() if self._idle else None
            if kept is not None and not kept.reusable:
                continue
            connection = kept or await self.connect()
            try:
                answer = await connection.ask(request, on_line)
            except Cut:
                if kept is not None and not connection.answered:
                    continue  # the server closed it while it was idle
                raise
            except asyncio.CancelledError:
                connection.close()
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def _context(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
