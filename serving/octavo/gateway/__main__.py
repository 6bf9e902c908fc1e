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
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn
import uvloop

from octavo.gateway.app import create_app
from octavo.gateway.http_protocol import bounded
from octavo.gateway.telemetry import tracing_of
from octavo.gateway.upstream import Upstream
from octavo.protocol import native
from octavo.protocol.errors import OctavoError
from octavo.settings import Settings, SettingsError

BEAT_SECONDS = 0.5
TURN_SECONDS = 0.25
LOOK_SECONDS = 1.0  # between two questions to the model server
AGAIN_SECONDS = 0.1  # while there is no answer
ANSWER_SECONDS = 2.0
END_SECONDS = 5  # under a parent that has let every request end before it asks
KEEP_ALIVE_SECONDS = 65  # longer than the usual 60 s of proxies, so that they close first
OTHER_FILES = 256  # descriptors of a worker that are no client's connection
LEAST_MESSAGE_BYTES = 64 << 20  # log probabilities of a long prompt come in one message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until asked to end; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m octavo.gateway", description="HTTP gateway worker")
    parser.add_argument("--fd", type=int, help="an inherited listening socket; the worker ends with its parent")
    parser.add_argument("--beat", type=int, help="a pipe to its parent: what this worker says of itself (see _beat)")
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
    upstream = make_upstream(settings)
    room = room_for(settings.max_connections)
    config = make_config(settings, upstream=upstream, drain_seconds=drain_seconds, max_connections=room)
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        return _fail(f"TLS_CERTFILE={settings.tls_certfile}: cannot be used with TLS_KEYFILE: {error}", code=2)
    server = Server(config)
    parent = os.pidfd_open(os.getppid()) if fd is not None else None
    uvloop.run(_serve(server, listener, parent, given.beat, upstream))
    return 0


class Server(uvicorn.Server):
    """uvicorn's server that ends with exit code 0 when asked to (uvicorn itself raises the signal again at the end) and
    looks less often whether it is: each look wakes the process.
    """

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # 0: the date in its headers is due
            await asyncio.sleep(TURN_SECONDS)

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


def room_for(max_connections: int) -> int:
    """As many of them as this process may have descriptors for, after asking for all that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = max_connections if hard == resource.RLIM_INFINITY else max(1, min(max_connections, hard - OTHER_FILES))
    if room < max_connections:
        logging.getLogger("octavo.gateway").warning("MAX_CONNECTIONS is lowered to %d: ulimit -n is %d", room, hard)
    return room


def make_upstream(settings: Settings) -> Upstream:
    """This worker's way to Triton."""
    max_message_bytes = max(LEAST_MESSAGE_BYTES, 2 * settings.max_body_bytes + (1 << 20))
    return Upstream(
        settings.local_target(settings.grpc_port), max_message_bytes=max_message_bytes, clock=time.monotonic
    )


def make_config(
    settings: Settings,
    *,
    upstream: Upstream | None = None,
    drain_seconds: int | None = None,
    max_connections: int | None = None,
) -> uvicorn.Config:
    """uvicorn as this gateway wants it: httptools with bounds, no websockets, no log of its own."""
    return uvicorn.Config(
        create_app(
            settings,
            upstream or make_upstream(settings),
            native_schema=native.request_schema(),
            tracing=tracing_of(settings),
        ),
        loop="uvloop",
        http=bounded(settings.max_connections if max_connections is None else max_connections),
        ssl_certfile=settings.tls_certfile,
        ssl_keyfile=settings.tls_keyfile,
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
    server: uvicorn.Server, listener: socket.socket, parent: int | None, beat: int | None, upstream: Upstream
) -> None:
    """Serve until a signal comes, or until the parent dies: then at once, for nobody restarts what fails any more."""

    def orphaned() -> None:
        asyncio.get_running_loop().remove_reader(parent)  # type: ignore[arg-type]
        logging.getLogger("octavo.gateway").warning("the parent process is gone")
        server.config.timeout_graceful_shutdown = 0
        server.should_exit = True

    if parent is not None:
        asyncio.get_running_loop().add_reader(parent, orphaned)
    tasks = []
    if beat is not None:
        tasks = [asyncio.ensure_future(work) for work in (_beat(beat, upstream), _look(beat, server, upstream))]
    await server.serve(sockets=[listener])
    for task in tasks:
        task.cancel()


async def _beat(pipe: int, upstream: Upstream) -> None:
    """Show the parent that this loop turns (.), and whether a request has ended well since the last time (*): the front
    end may die before anybody has asked it.
    """
    told = 0
    while True:
        _tell(pipe, b"*" if upstream.num_finished > told else b".")
        told = upstream.num_finished
        await asyncio.sleep(BEAT_SECONDS)


async def _look(pipe: int, server: uvicorn.Server, upstream: Upstream) -> None:
    """Tell the parent whether this worker reaches the model server (+) or not (-): a server that is back is of no use
    to clients before the worker's own connection is. What came on a carrier meanwhile is an answer too.
    """
    while not server.started:
        await asyncio.sleep(0.02)
    while not server.should_exit:
        try:
            if not upstream.heard_within(LOOK_SECONDS):
                await upstream.ask({"op": "info"}, timeout=ANSWER_SECONDS)
        except OctavoError:
            _tell(pipe, b"-")
            await asyncio.sleep(AGAIN_SECONDS)
        else:
            _tell(pipe, b"+")
            await asyncio.sleep(LOOK_SECONDS)


def _tell(pipe: int, word: bytes) -> None:
    """A full pipe is no error: then it is the parent that hangs."""
    with contextlib.suppress(OSError):
        os.write(pipe, word)


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if level != "DEBUG":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _fail(message: str, *, code: int) -> int:
    print(f"octavo: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
