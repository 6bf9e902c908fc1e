"""The page server: what it answers, and what it does not put up with."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from octavo.node import pages
from octavo.node.pages import Page, PageServer, get


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async def hello() -> Page:
        return Page("hello\n")

    async def away() -> Page:
        return Page("not now\n", status=503, retry_after=2)

    sock = socket.create_server(("127.0.0.1", 0))
    server = await PageServer({"/hello": hello, "/away": away}).start(sock)
    yield sock.getsockname()[1]
    server.close()


async def exchange(port: int, data: bytes) -> bytes:
    """Send bytes, end the sending side, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(-1), 5)
    writer.close()
    return answer


async def test_get_and_head_differ_in_the_body_alone(port: int) -> None:
    full = await exchange(port, b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n")
    head = await exchange(port, b"HEAD /hello HTTP/1.1\r\nhost: a\r\n\r\n")
    assert full == head + b"hello\n"
    assert b"content-length: 6\r\n" in head


async def test_query_and_closing_slash_do_not_matter(port: int) -> None:
    assert await get("127.0.0.1", port, "/hello/?a=1", seconds=2) == (200, "hello\n")


async def test_unavailable_says_when_to_come_back(port: int) -> None:
    answer = await exchange(port, b"GET /away HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"retry-after: 2\r\n" in answer


async def test_connection_serves_several_requests(port: int) -> None:
    answer = await exchange(port, b"GET /hello HTTP/1.1\r\n\r\n" * 3)
    assert answer.count(b"hello\n") == 3


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"POST /hello HTTP/1.1", b"405"), (b"GET /nothing HTTP/1.1", b"404"), (b"nonsense", b"405")],
)
async def test_what_is_not_served_gets_a_status(port: int, request_line: bytes, status: bytes) -> None:
    assert (await exchange(port, request_line + b"\r\n\r\n")).split(b" ")[1] == status


async def test_long_head_ends_the_connection(port: int) -> None:
    assert await exchange(port, b"GET /hello HTTP/1.1\r\nx: " + b"a" * 100_000) == b""


async def test_body_is_not_read(port: int) -> None:
    answer = await exchange(port, b"GET /hello HTTP/1.1\r\ncontent-length: 20\r\n\r\nGET /hello HTTP/1.1")
    assert answer.count(b"HTTP/1.1 200") == 1


async def test_half_a_request_is_not_held_for_ever(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "READ_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /hello HTTP/1.1\r\n")
    assert await asyncio.wait_for(reader.read(-1), 2) == b""
    writer.close()
