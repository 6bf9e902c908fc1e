"""A gateway worker: `python -m octavo.gateway [--fd N]`.

One process, one event loop. With --fd it serves the listening socket that its parent opened and ends with that
parent; without, it binds HOST:PUSH_MODE_HTTP_PORT itself. SIGTERM: no new connections, running requests get
DRAIN_SECONDS to end (a few seconds under a parent, which drains first). Exit codes: 0 asked to end, 2 bad settings,
3 port in use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn
import uvloop

from octavo.gateway.app import create_app
from octavo.gateway.http_protocol import BoundedHttpProtocol
from octavo.gateway.upstream import Upstream
from octavo.protocol import native
from octavo.settings import Settings, SettingsError

BEAT_SECONDS = 0.5
END_SECONDS = 5  # under a parent that has let every request end before it asks
KEEP_ALIVE_SECONDS = 65  # longer than the usual 60 s of proxies, so that they close first
LEAST_MESSAGE_BYTES = 64 << 20  # log probabilities of a long prompt come in one message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until asked to end; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m octavo.gateway", description="HTTP gateway worker")
    parser.add_argument("--fd", type=int, help="an inherited listening socket; the worker ends with its parent")
    parser.add_argument("--beat", type=int, help="a pipe to its parent: a byte twice a second says that the loop turns")
    given = parser.parse_args(arguments)
    fd = given.fd
    try:
        settings = Settings.from_environ()
    except SettingsError as error:
        return _fail(str(error), code=2)
    if fd is None and settings.push_mode_http_port == -1:
        return _fail("PUSH_MODE_HTTP_PORT=-1: there is no port to serve", code=2)
    try:
        listener = socket.socket(fileno=fd) if fd is not None else listen(settings.host, settings.push_mode_http_port)
    except OSError as error:
        return _fail(
            f"PUSH_MODE_HTTP_PORT={settings.push_mode_http_port}: cannot listen: {os.strerror(error.errno or 0)}",
            code=3,
        )
    _log_to_stderr(settings.log_level)
    drain_seconds = settings.drain_seconds if fd is None else min(settings.drain_seconds, END_SECONDS)
    server = Server(make_config(settings, drain_seconds=drain_seconds))
    parent = os.pidfd_open(os.getppid()) if fd is not None else None
    uvloop.run(_serve(server, listener, parent, given.beat))
    return 0


class Server(uvicorn.Server):
    """uvicorn's server that ends with exit code 0 when asked to: uvicorn itself raises the signal again at the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def make_config(settings: Settings, *, drain_seconds: int | None = None) -> uvicorn.Config:
    """uvicorn as this gateway wants it: httptools with a bounded head, no websockets, no log of its own."""
    max_message_bytes = max(LEAST_MESSAGE_BYTES, 2 * settings.max_body_bytes + (1 << 20))
    upstream = Upstream(
        settings.local_target(settings.grpc_port), max_message_bytes=max_message_bytes, clock=time.monotonic
    )
    return uvicorn.Config(
        create_app(settings, upstream, native_schema=native.request_schema()),
        loop="uvloop",
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.drain_seconds if drain_seconds is None else drain_seconds,
    )


async def _serve(
    server: uvicorn.Server, listener: socket.socket, parent: int | None, beat: int | None = None
) -> None:
    """Serve until a signal comes, or until the parent dies: then at once, for nobody restarts what fails any more."""

    def orphaned() -> None:
        asyncio.get_running_loop().remove_reader(parent)  # type: ignore[arg-type]
        logging.getLogger("octavo.gateway").warning("the parent process is gone")
        server.config.timeout_graceful_shutdown = 0
        server.should_exit = True

    if parent is not None:
        asyncio.get_running_loop().add_reader(parent, orphaned)
    beating = asyncio.ensure_future(_beat(beat)) if beat is not None else None
    await server.serve(sockets=[listener])
    if beating is not None:
        beating.cancel()


async def _beat(pipe: int) -> None:
    """Show the parent that this loop turns. A full pipe is no error: then it is the parent that hangs."""
    while True:
        with contextlib.suppress(OSError):
            os.write(pipe, b".")
        await asyncio.sleep(BEAT_SECONDS)


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if level != "DEBUG":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _fail(message: str, *, code: int) -> int:
    print(f"octavo: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
