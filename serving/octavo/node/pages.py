"""A small HTTP/1.1 server for pages of text: GET and HEAD, bounded heads, bounded time. Node's event loop.

Health and metrics must answer whatever happens elsewhere, to anyone, without holding memory for a client that sends
half a request: so no web framework, no request bodies, and a deadline on every read and write.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

MAX_HEAD_BYTES = 16 << 10
READ_SECONDS = 10.0
MAX_CONNECTIONS = 256

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"


@dataclass(frozen=True)
class Page:
    """One answer."""

    body: str
    status: int = 200
    content_type: str = TEXT
    retry_after: int | None = None


Handler = Callable[[], Awaitable[Page]]


class PageServer:
    """Serves a fixed set of paths on one socket."""

    def __init__(self, pages: Mapping[str, Handler]) -> None:
        self._pages = pages
        self._connections = 0

    async def start(self, sock: socket.socket) -> asyncio.Server:
        """Listen on a bound socket; close the returned server to end."""
        return await asyncio.start_server(self._serve, sock=sock, limit=MAX_HEAD_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= MAX_CONNECTIONS:
                while await self._answer_one(reader, writer):
                    pass
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError, OSError):
            pass  # the client left, is too slow, or says too much
        finally:
            self._connections -= 1
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read one request and answer it; False if the connection ends with it."""
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), READ_SECONDS)
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        method, target, version = words if len(words) == 3 else ("", "", "")
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        keep = version == "HTTP/1.1" and headers.get("connection") != "close" and not _has_body(headers)
        page = await self._page(method, target.partition("?")[0])
        writer.write(render(page, head_only=method == "HEAD", keep=keep))
        await asyncio.wait_for(writer.drain(), READ_SECONDS)
        return keep

    async def _page(self, method: str, path: str) -> Page:
        if method not in ("GET", "HEAD"):
            return Page("only GET and HEAD are served here\n", status=405)
        handler = self._pages.get(path.rstrip("/") or "/")
        if handler is None:
            return Page("not found; here are: " + " ".join(self._pages) + "\n", status=404)
        return await handler()


def _has_body(headers: Mapping[str, str]) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def render(page: Page, *, head_only: bool, keep: bool) -> bytes:
    """The bytes of an answer."""
    body = page.body.encode()
    lines = [
        f"HTTP/1.1 {page.status} {HTTPStatus(page.status).phrase}",
        f"content-type: {page.content_type}",
        f"content-length: {len(body)}",
        "cache-control: no-cache",
        f"connection: {'keep-alive' if keep else 'close'}",
    ]
    if page.retry_after is not None:
        lines.append(f"retry-after: {page.retry_after}")
    head = "\r\n".join(lines) + "\r\n\r\n"
    return head.encode() + (b"" if head_only else body)


async def get(host: str, port: int, path: str, *, seconds: float, tls: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Fetch a page of this machine: status and body. Raises OSError or asyncio.TimeoutError."""
    return await ask(host, port, "GET", path, seconds=seconds, tls=tls)


async def ask(
    host: str, port: int, method: str, path: str, *, seconds: float, tls: ssl.SSLContext | None = None
) -> tuple[int, str]:
    """The same with any method that has no body."""
    return await asyncio.wait_for(_ask(host, port, method, path, tls), seconds)


async def _ask(host: str, port: int, method: str, path: str, tls: ssl.SSLContext | None) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    try:
        writer.write(f"{method} {path} HTTP/1.0\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read(-1)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        raise ConnectionError("not an HTTP answer")
    return int(words[1]), body.decode("utf-8", errors="replace")
