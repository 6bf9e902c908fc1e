"""The client library of Octavo: sync and async, over HTTP or gRPC, without torch.

    from octavo_client import Client, Options

    with Client("http://127.0.0.1:9965") as client:          # or "grpc://127.0.0.1:8811"
        print(client.generate("Hello, how are you?").text)
        for delta in client.stream("hello, llm", options=Options(max_dec_len=64)):
            print(delta.text, end="", flush=True)

A stream that loses its server asks for the rest by itself: it sends the request again with the tokens it holds.
"""

from __future__ import annotations

from octavo.protocol.errors import (
    BodyTooLarge,
    Cancelled,
    Conflict,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    OctavoError,
    QueueFull,
    RequestTimeout,
    Unauthorized,
    Unavailable,
)
from octavo_client.async_client import AsyncClient
from octavo_client.client import Client
from octavo_client.history import ChatHistory
from octavo_client.options import Options
from octavo_client.results import Delta, Generation, Usage
from octavo_client.transport import TransportLost

__all__ = [
    "AsyncClient",
    "BodyTooLarge",
    "Cancelled",
    "ChatHistory",
    "Client",
    "Conflict",
    "ContextLengthExceeded",
    "Delta",
    "Generation",
    "InternalError",
    "InvalidRequest",
    "NotFound",
    "OctavoError",
    "Options",
    "QueueFull",
    "RequestTimeout",
    "TransportLost",
    "Unauthorized",
    "Unavailable",
    "Usage",
]
