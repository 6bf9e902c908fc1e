"""A gateway on a real port in front of a stand-in for Triton, both on one loop in a thread of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from gateway.fake_triton import FakeTriton
from octavo.gateway.app import create_app
from octavo.gateway.http_protocol import BoundedHttpProtocol
from octavo.gateway.upstream import Upstream
from octavo.protocol import native
from octavo.settings import Settings


class Stack:
    """What a test talks to: `url`, and the `fake` behind it."""

    def __init__(self, **environ: str) -> None:
        self.fake = FakeTriton()
        self.loop = asyncio.new_event_loop()
        self.settings = Settings.from_environ({"SERVED_MODEL_NAME": "tiny", **environ})
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start())
        self.url = f"http://127.0.0.1:{self.port}"

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    async def _start(self) -> None:
        await self.fake.start()
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        address = f"127.0.0.1:{self.fake.port}"
        upstream = Upstream(address, max_message_bytes=64 << 20, clock=time.monotonic, outage_seconds=3.0)
        app = create_app(self.settings, upstream, native_schema=native.request_schema())
        config = uvicorn.Config(app, http=BoundedHttpProtocol, ws="none", lifespan="on", log_config=None)
        self.server = uvicorn.Server(config)
        self._serving = asyncio.ensure_future(self.server._serve([listener]))
        while not self.server.started:
            await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        self.server.config.timeout_graceful_shutdown = 0
        self.server.should_exit = True
        await self._serving
        await self.fake.stop()

    def close(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


@contextmanager
def running(**environ: str) -> Iterator[Stack]:
    stack = Stack(**environ)
    try:
        yield stack
    finally:
        stack.close()


@pytest.fixture(scope="session")
def shared_stack() -> Iterator[Stack]:
    with running() as stack:
        yield stack


@pytest.fixture
def stack(shared_stack: Stack) -> Stack:
    shared_stack.fake.reset()
    return shared_stack


@pytest.fixture
def make_stack() -> Iterator[Callable[..., Stack]]:
    """Stacks with other settings; closed after the test."""
    made: list[Stack] = []

    def make(**environ: str) -> Stack:
        made.append(Stack(**environ))
        return made[-1]

    yield make
    for stack in made:
        stack.close()


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for a condition; fail if it does not come true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
