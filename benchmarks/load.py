"""A lean load generator: native streams over raw sockets, every piece's arrival noted, hardly any CPU of its own.

Runs in the process that calls it; its own CPU time is reported because it shares the machine with the server. Pieces
are only kept while the streams run; what they say is read afterwards.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass
class StreamTimes:
    """One stream: when it was asked, when each message and each token came (seconds), its last message."""

    asked: float
    arrivals: list[float] = field(default_factory=list)  # of messages
    token_arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    last: dict[str, object] = field(default_factory=dict)
    gaps_in_order: bool = True  # every message came, once, in order


@dataclass(frozen=True)
class Load:
    """What one run measured."""

    streams: list[StreamTimes]
    seconds: float
    own_cpu_seconds: float

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.streams)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def first_token_ms(self) -> list[float]:
        return sorted((stream.arrivals[0] - stream.asked) * 1e3 for stream in self.streams)

    def gaps_ms(self) -> list[float]:
        pairs = (pair for stream in self.streams for pair in zip(stream.arrivals, stream.arrivals[1:]))
        return sorted((after - before) * 1e3 for before, after in pairs)


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values; 0 if there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


class _Stream(asyncio.Protocol):
    """One connection: sends a request, keeps what comes and when."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.asked = 0.0
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.asked = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.monotonic())
        self.pieces.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)


def _request(body: dict[str, object]) -> bytes:
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return head.encode() + data


async def _all(port: int, bodies: list[dict[str, object]]) -> list[_Stream]:
    loop = asyncio.get_running_loop()
    streams = [_Stream(_request(body)) for body in bodies]
    await asyncio.gather(*(loop.create_connection(lambda one=one: one, "127.0.0.1", port) for one in streams))
    await asyncio.gather(*(stream.over for stream in streams))
    return streams


def _read(stream: _Stream) -> StreamTimes:
    """What a stream said, line by line. A line is never split over HTTP chunks. Raises RuntimeError on an error."""
    times = StreamTimes(stream.asked)
    ends = list(accumulate(map(len, stream.pieces)))
    at, indexes = 0, []
    for line in b"".join(stream.pieces).splitlines(keepends=True):
        at += len(line)
        if line.startswith(b"{"):
            message = json.loads(line)
            arrival = stream.times[bisect_left(ends, at)]
            times.arrivals.append(arrival)
            times.token_arrivals += [arrival] * len(message.get("token_ids", ()))
            times.last = message
            indexes.append(message.get("send_idx"))
    if times.last.get("error_msg") or times.last.get("is_end") != 1:
        raise RuntimeError(times.last.get("error_msg") or "a stream has no last message")
    count = times.last["tokens_all_num"]
    assert isinstance(count, int)
    times.tokens = count
    times.gaps_in_order = indexes == list(range(len(indexes))) and len(times.token_arrivals) == count
    return times


def run(port: int, bodies: list[dict[str, object]]) -> Load:
    """Send all bodies at once and read every stream to its end. Raises RuntimeError on an error answer."""
    gc.collect()
    cpu, began = time.process_time(), time.monotonic()
    streams = asyncio.run(_all(port, bodies))
    seconds, own = time.monotonic() - began, time.process_time() - cpu
    return Load([_read(stream) for stream in streams], seconds, own)
