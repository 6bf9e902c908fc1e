"""Where the answers of one request go. `model.py` makes one from Triton's response sender; tests make their own."""

from __future__ import annotations

from typing import Protocol


class SinkClosed(Exception):
    """The receiver is gone; nothing more can be sent."""


class Sink(Protocol):
    """The way back to whoever sent a request. One thread at a time sends; another one may ask meanwhile."""

    def send(self, payload: bytes, final: bool) -> None:
        """Send one message; the last one of the request has `final`, and is empty if nothing is left to say.

        Raises SinkClosed.
        """
        ...

    def cancelled(self) -> bool:
        """Whether the receiver gave up: a blocking round trip."""
        ...
