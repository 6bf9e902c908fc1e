"""Listening sockets of node and a look at the ports that its children will bind.

Node's main thread, before anything starts.
"""

from __future__ import annotations

import errno
import socket

from octavo.node.errors import EXIT_BAD_SETTINGS, EXIT_PORT_IN_USE, NodeError
from octavo.settings import Settings

BACKLOG = 4096
LOOPBACK = "127.0.0.1"


def listen(name: str, host: str, port: int) -> socket.socket:
    """A listening socket for the port that the variable `name` gives. Raises NodeError naming both."""
    sock = _bound(name, host, port)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def check_free(name: str, host: str, port: int) -> None:
    """Raise NodeError if the port cannot be bound now."""
    _bound(name, host, port).close()


def _bound(name: str, host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise NodeError(f"HOST={host}: {error.strerror}", exit_code=EXIT_BAD_SETTINGS) from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(1)  # two binds succeed where one of them does not listen yet
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise NodeError(f"HOST={host}: not an address of this machine", exit_code=EXIT_BAD_SETTINGS) from None
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise NodeError(f"{name}={port}: {reason} on {host}", exit_code=EXIT_PORT_IN_USE) from None
    return sock


def check_all(settings: Settings) -> None:
    """Raise NodeError for the first of the server's ports that is not free."""
    for name in ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "PUSH_MODE_HTTP_PORT"):
        port = getattr(settings, name.lower())
        if port != -1:
            check_free(name, settings.host, port)
    check_free("INFER_QUEUE_PORT", LOOPBACK, settings.infer_queue_port)


def free_port() -> int:
    """A loopback port that nothing uses at this moment."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])
