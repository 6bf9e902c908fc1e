"""The HTTP client: addresses, bodies of every framing cut at every place, connections that end early."""

from __future__ import annotations

import asyncio

import pytest

from octavo.cli.bench.client import Address, Answer, Connection, Cut

LINES = [b'{"a": 1}', b"data: {}", b"last"]
BODY = b'{"a": 1}\r\ndata: {}\n\nlast'
CHUNKED = b"".join(f"{len(part):X};note=1\r\n".encode() + part + b"\r\n" for part in (BODY[:3], BODY[3:11], BODY[11:]))
ANSWERS = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED + b"0\r\nTrailer: x\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
}


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.aborted = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


def connect() -> tuple[Connection, FakeTransport, list[bytes], asyncio.Future[Answer]]:
    connection, transport, lines = Connection(), FakeTransport(), []
    connection.connection_made(transport)
    return connection, transport, lines, connection.ask(b"GET", lambda line, now: lines.append(line))


@pytest.mark.parametrize("framing", ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
async def test_lines_do_not_depend_on_how_an_answer_is_cut(framing: str, size: int) -> None:
    connection, transport, lines, done = connect()
    data = ANSWERS[framing]
    for start in range(0, len(data), size):
        assert not done.done()
        connection.data_received(data[start : start + size])
    assert (await done).status == 200
    assert lines == LINES
    assert transport.written == b"GET"
    assert connection.reusable


async def test_a_body_without_length_ends_with_the_connection() -> None:
    connection, _, lines, done = connect()
    connection.data_received(b"HTTP/1.0 200 OK\r\n\r\n" + BODY)
    assert not done.done()
    connection.connection_lost(None)
    assert (await done).status == 200
    assert lines == LINES
    assert not connection.reusable


@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_an_answer_cut_anywhere_is_an_error(framing: str) -> None:
    for end in range(len(ANSWERS[framing])):
        connection, _, _, done = connect()
        connection.data_received(ANSWERS[framing][:end])
        connection.connection_lost(None)
        with pytest.raises(Cut):
            await done


async def test_an_error_answer_has_its_body_whole_and_no_lines() -> None:
    connection, _, lines, done = connect()
    connection.data_received(b"HTTP/1.1 429 Busy\r\nConnection: close\r\nContent-Length: 9\r\n\r\none\ntwo\nx")
    assert await done == Answer(429, b"one\ntwo\nx")
    assert lines == []
    assert not connection.reusable


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
async def test_what_is_not_http_is_an_error(data: bytes) -> None:
    connection, transport, _, done = connect()
    connection.data_received(data)
    with pytest.raises(Cut, match="not HTTP"):
        await done
    assert transport.aborted


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:8000", Address("a", 8000, False, "")),
        ("https://b", Address("b", 443, True, "")),
        ("c:9965", Address("c", 9965, False, "")),
        ("http://d/x/v1/", Address("d", 80, False, "/x")),
    ],
)
def test_addresses_are_read(url: str, address: Address) -> None:
    assert Address.parse(url) == address


@pytest.mark.parametrize("url", ["ftp://a", "http://", "grpc://a:8811"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        Address.parse(url)
