"""Request bodies: read within limits of size and time, parsed once, told apart by dialect.

Runs on the event loop of a gateway worker. Knows HTTP bodies and JSON; what the fields mean is for protocol/ and the
front end.
"""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.types import Receive

from octavo.protocol.errors import BodyTooLarge, Cancelled, InvalidRequest, RequestTimeout

BODY_SECONDS = 30.0  # for a whole body to arrive
MAX_DEPTH = 64
DISCARD_BYTES = 16 << 20  # read and thrown away after a 413, so that the client gets to read the answer
DISCARD_SECONDS = 5.0

NATIVE, OPENAI = "native", "openai"
NATIVE_WORDS = frozenset(
    {
        *("text", "input_ids", "req_id", "max_dec_len", "min_dec_len", "seq_len", "topp", "penalty_score"),
        *("frequency_score", "presence_score", "eos_token_ids", "infer_seed", "return_all_tokens", "return_usage"),
        *("benchmark", "system", "timeout"),
    }
)


async def read_object(request: Request, *, max_bytes: int, seconds: float = BODY_SECONDS) -> dict[str, object]:
    """The body as a JSON object. Raises BodyTooLarge, RequestTimeout or InvalidRequest."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) < 20 and int(declared) > max_bytes:
        if "expect" not in request.headers:
            await _discard(request.receive)
        raise BodyTooLarge(f"the body has {int(declared)} bytes; at most {max_bytes} are allowed (MAX_BODY_BYTES)")
    try:
        body = await asyncio.wait_for(_read(request, max_bytes), seconds)
    except asyncio.TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {seconds:g} s") from None
    return parse_object(body)


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client has left")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_bytes:
            if more:
                await _discard(request.receive)
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes (MAX_BODY_BYTES)")
    return bytes(body)


async def _discard(receive: Receive) -> None:
    """Read on for a while: closing on unread data would reset the connection before the client sees the answer."""

    async def drain() -> None:
        left = DISCARD_BYTES
        while left > 0:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            left -= len(message.get("body", b""))

    try:
        await asyncio.wait_for(drain(), DISCARD_SECONDS)
    except asyncio.TimeoutError:
        return


def parse_object(body: bytes) -> dict[str, object]:
    """Parse a JSON object of bounded depth. Raises InvalidRequest that says where it breaks."""
    if not body.strip():
        raise InvalidRequest("the body is empty; a JSON object is needed")
    try:
        value = msgspec.json.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the body is not JSON that can be read: {_first_words(error)}") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {_first_words(error)}") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise InvalidRequest("the body holds a number that is too long") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    _check_shape(value, num_containers=body.count(b"{") + body.count(b"["))
    return value


def _first_words(error: Exception) -> str:
    return str(error).split(" - at ")[0].removeprefix("JSON is malformed: ")


def _check_shape(value: dict[str, object], *, num_containers: int) -> None:
    """Bound the depth; a body with few brackets cannot be deep."""
    if num_containers <= MAX_DEPTH:
        return
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        children = (entry.values() if isinstance(entry, dict) else entry for entry in level)
        level = [one for entries in children for one in entries if isinstance(one, (dict, list))]  # type: ignore[attr-defined]
        if not level:
            return
    raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def dialects_of(body: dict[str, object]) -> tuple[str, str]:
    """(dialect of the fields, dialect of the answer) for a route that speaks both."""
    native_words = any(body.get(name) is not None for name in NATIVE_WORDS)
    wanted = body.get("response_type")
    if wanted is not None:
        if wanted == "openai":
            text = body.get("prompt") is not None and body.get("text") is None and body.get("input_ids") is None
            return (NATIVE if native_words and not text else OPENAI), OPENAI
        if wanted == "fastdeploy":
            return NATIVE, NATIVE
        raise InvalidRequest("response_type must be fastdeploy or openai", field="response_type")
    if native_words:
        return NATIVE, NATIVE
    if body.get("model") is not None or body.get("prompt") is not None:
        return OPENAI, OPENAI
    return NATIVE, NATIVE
