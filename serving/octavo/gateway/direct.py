"""The short way of tokens in the middle of a stream: from the task that reads the carrier to the connection.

Event loop of a gateway worker. Waking the handler of each request for each token costs more than all else that is done
with a token here. So while a handler waits for messages, and its client reads, what says no more than new tokens is
rendered and written by whoever delivers it. Everything else wakes the handler as before: the first and last messages,
errors, a connection whose buffer is full, one that is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from starlette.types import Scope

if TYPE_CHECKING:
    from octavo.gateway.upstream import Batch

WRITER = "octavo.writer"  # among the extensions of an ASGI scope


class Writer(Protocol):
    """A connection whose answer has begun (http_protocol.py)."""

    num_bytes: int  # of what was written

    @property
    def writable(self) -> bool:
        """Whether there is room in its buffer, and anybody there."""
        ...

    def write(self, piece: bytes) -> None:
        """Send a piece of the body."""
        ...


class Direct:
    """One request's short way. Closed until its handler opens it; the handler sends what comes before that."""

    def __init__(self, render: Callable[[Batch], bytes]) -> None:
        """`render` makes the piece of the body that says a batch."""
        self._render = render
        self._writer: Writer | None = None

    def open(self, scope: Scope) -> None:
        """The headers were sent. Without a writer in the scope (another HTTP server) it stays closed."""
        self._writer = scope.get("extensions", {}).get(WRITER)

    @property
    def ready(self) -> bool:
        return self._writer is not None and self._writer.writable

    def send(self, batch: Batch) -> None:
        """Only while `ready`."""
        assert self._writer is not None
        if piece := self._render(batch):
            self._writer.write(piece)
