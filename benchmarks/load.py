"""A lean load generator: native streams over raw sockets, every line's arrival noted, hardly any CPU of its own.

Runs in the process that calls it; its own CPU time is reported because it shares the machine with the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field


@dataclass
class StreamTimes:
    """One stream: when it was asked, when each message came (seconds), how many tokens in all."""

    asked: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    last: dict[str, object] = field(default_factory=dict)
    gaps_in_order: bool = True


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


def percentile(values: list[float], share: float) -> float:
    """Of sorted values; 0 if there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def _stream(port: int, body: dict[str, object]) -> StreamTimes:
    data = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    times = StreamTimes(time.monotonic())
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + data)
    last = b""
    while line := await reader.readline():
        if line.startswith(b"{"):
            times.arrivals.append(time.monotonic())
            last = line
    writer.close()
    times.last = json.loads(last)
    if times.last.get("error_msg"):
        raise RuntimeError(times.last["error_msg"])
    count = times.last["tokens_all_num"]
    assert isinstance(count, int)
    times.tokens = count
    times.gaps_in_order = times.last["send_idx"] == len(times.arrivals) - 1
    return times


async def _all(port: int, bodies: list[dict[str, object]]) -> list[StreamTimes]:
    return list(await asyncio.gather(*(_stream(port, body) for body in bodies)))


def run(port: int, bodies: list[dict[str, object]]) -> Load:
    """Send all bodies at once and read every stream to its end. Raises RuntimeError on an error answer."""
    cpu, began = time.process_time(), time.monotonic()
    streams = asyncio.run(_all(port, bodies))
    return Load(streams, time.monotonic() - began, time.process_time() - cpu)
