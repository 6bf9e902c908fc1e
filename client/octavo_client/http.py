"""Transports over the HTTP gateway: JSON lines for generations, one JSON object for ops."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator

import httpx
import msgspec

from octavo.protocol.errors import InternalError, OctavoError, from_native
from octavo_client.transport import JsonObject, TransportLost

GENERATE = "/v1/chat/completions"
OPS = {"tokenize": "/tokenize", "detokenize": "/detokenize", "abort": "/v1/abort"}
CONNECT_SECONDS = 5.0
MARGIN_SECONDS = 5.0  # the server ends a request at its timeout by itself; the socket waits a little longer


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds + MARGIN_SECONDS, connect=CONNECT_SECONDS)


def _refusal(status: int, body: bytes) -> OctavoError | TransportLost:
    """The error in an answer that is not 200: ours if it speaks our shape."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return TransportLost(f"HTTP {status} without an error object")
    if isinstance(value, dict) and "error_code" in value:
        return from_native(value)
    message = value.get("error", {}).get("message") if isinstance(value, dict) else None
    return from_native({"error_msg": message or f"HTTP {status}", "error_code": status})


def _line(line: str) -> JsonObject:
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError:
        raise TransportLost("a line was cut") from None
    if not isinstance(value, dict):
        raise InternalError("the server sent a line that is not an object")
    return value


def _op(payload: JsonObject) -> tuple[str, JsonObject]:
    body = {name: value for name, value in payload.items() if name != "op"}
    return OPS[str(payload["op"])], body


class HttpTransport:
    """Blocking, with a connection pool."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.Client(base_url=base_url, headers=_headers(api_key), limits=limits, trust_env=False)

    def stream(self, payload: JsonObject, *, timeout: float) -> Iterator[JsonObject]:
        try:
            with self._http.stream("POST", GENERATE, json=payload, timeout=_timeout(timeout)) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.read())
                for line in response.iter_lines():
                    yield _line(line)
        except httpx.TransportError as error:
            raise TransportLost(str(error) or type(error).__name__) from error

    def call(self, payload: JsonObject, *, timeout: float) -> JsonObject:
        path, body = _op(payload)
        try:
            response = self._http.post(path, json=body, timeout=_timeout(timeout))
        except httpx.TransportError as error:
            raise TransportLost(str(error) or type(error).__name__) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        return _line(response.text)

    def close(self) -> None:
        self._http.close()


class AsyncHttpTransport:
    """For one event loop, with a connection pool."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=base_url, headers=_headers(api_key), limits=limits, trust_env=False)

    async def stream(self, payload: JsonObject, *, timeout: float) -> AsyncGenerator[JsonObject, None]:
        try:
            async with self._http.stream("POST", GENERATE, json=payload, timeout=_timeout(timeout)) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    yield _line(line)
        except httpx.TransportError as error:
            raise TransportLost(str(error) or type(error).__name__) from error

    async def call(self, payload: JsonObject, *, timeout: float) -> JsonObject:
        path, body = _op(payload)
        try:
            response = await self._http.post(path, json=body, timeout=_timeout(timeout))
        except httpx.TransportError as error:
            raise TransportLost(str(error) or type(error).__name__) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        return _line(response.text)

    async def close(self) -> None:
        await self._http.aclose()
