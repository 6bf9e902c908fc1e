"""What a transport does for a client: carry one request, one answer of JSON objects. HTTP and gRPC stand behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Protocol
from urllib.parse import urlsplit

JsonObject = dict[str, object]


class TransportLost(ConnectionError):
    """The connection failed before the answer was whole. What was received stays valid."""


class Transport(Protocol):
    def stream(self, payload: JsonObject, *, timeout: float) -> Iterator[JsonObject]:
        """Messages of a generation. Closing the iterator cancels it. Raises TransportLost, OctavoError."""
        ...

    def call(self, payload: JsonObject, *, timeout: float) -> JsonObject:
        """One op (tokenize, detokenize, abort, info). Raises TransportLost, OctavoError."""
        ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    def stream(self, payload: JsonObject, *, timeout: float) -> AsyncGenerator[JsonObject, None]: ...

    async def call(self, payload: JsonObject, *, timeout: float) -> JsonObject: ...

    async def close(self) -> None: ...


def split_url(url: str) -> tuple[str, str]:
    """("http", base URL) or ("grpc", host:port). Raises ValueError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme in ("http", "https"):
        return "http", f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    if parts.scheme == "grpc" and parts.netloc:
        return "grpc", parts.netloc
    raise ValueError(f"{url}: must be http://host:port, https://host:port or grpc://host:port")
