"""The native dialect: a JSON line per message, or one object.

Handlers of a gateway worker. A message goes out as it came in, with `error_msg` and `error_code` put before its
closing brace; messages that say no more than their tokens are written all at once. Whatever is there goes out in one
write. What the fields mean and whether they are valid is the front end's business.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.gateway.context import Context
from octavo.gateway.direct import Direct
from octavo.gateway.edge import KEY_NAME
from octavo.gateway.responses import (
    NDJSON,
    SHUTTING_DOWN,
    STALL_SECONDS,
    StreamResponse,
    json_response,
    while_connected,
)
from octavo.gateway.streams import begin, guarded
from octavo.gateway.upstream import DEADLINE_MARGIN, Batch
from octavo.protocol.errors import InvalidRequest, OctavoError
from octavo.protocol.fields import wrong_type

DEFAULT_TIMEOUT = 300.0
_GOOD = b',"error_msg":"","error_code":0}\n'
_encoder = msgspec.json.Encoder()
_STREAM_ONLY = ("token", "token_ids", "send_idx", "is_end", "index", "fingerprint")
_OF_THE_PROMPT = ("prompt", "prompt_token_ids", "prompt_logprobs")
_GATEWAY_ONLY = ("stream", "response_type", "model")
# words of the inner wire that a native body has no use for
_FORBIDDEN = ("op", "dialect", "raw_text", "resume_inside", "owner", "key", "tenant")


def inner_request(body: dict[str, object], context: Context) -> dict[str, object]:
    """The request to the model: the body, with an id and a seed if it has none. Raises InvalidRequest."""
    for name in _FORBIDDEN:
        if body.get(name) is not None:
            raise InvalidRequest(f"{name} is not a field of a request", field=name)
    request = {name: value for name, value in body.items() if value is not None and name not in _GATEWAY_ONLY}
    req_id = request.setdefault("req_id", context.new_id())
    if not isinstance(req_id, str):
        raise wrong_type("req_id", "a string of 1 to 256 characters", req_id)
    if not 1 <= len(req_id) <= 256:
        raise InvalidRequest(f"req_id has {len(req_id)} characters and must be 1 to 256 long", field="req_id")
    if "infer_seed" not in request and "seed" not in request:
        request["infer_seed"] = context.draw_seed()
    return request


def key_of(request: Request) -> dict[str, object]:
    """The field by which the front end tells apart whose request it is: the key, or where none is asked for the
    address, which only decides whose turn it is.
    """
    name = request.scope.get(KEY_NAME)
    if name is not None:
        return {"key": name}
    return {} if request.client is None else {"tenant": request.client.host[:64]}


def timeout_of(request: dict[str, object]) -> float:
    """The request's own timeout; a value that makes no sense is refused by the front end."""
    timeout = request.get("timeout")
    good = isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and 0 < timeout <= 86_400
    return float(timeout) if good else DEFAULT_TIMEOUT  # type: ignore[arg-type]


def wants_stream(body: dict[str, object]) -> bool:
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise wrong_type("stream", "true or false", stream)
    return bool(stream)


async def answer_native(request: Request, body: dict[str, object], context: Context) -> Response:
    """Answer a native body in native shapes. Raises OctavoError before the first byte."""
    stream = wants_stream(body)
    context.check_model(body.get("model"))
    inner = inner_request(body, context) | key_of(request)
    if not stream and isinstance(inner.get("n"), int) and inner["n"] != 1:
        raise InvalidRequest("n above 1 needs stream: true, or the OpenAI dialect", field="n")
    timeout = timeout_of(inner)
    direct = Direct(_lines_of)
    events = context.upstream.generate(inner, timeout=timeout, direct=direct if stream else None)
    if not stream:
        whole = _whole(events, wants_usage=body.get("return_usage") is True)
        return json_response(await while_connected(request, whole))
    first = await while_connected(request, begin(events))
    req_id = str(inner["req_id"])
    return StreamResponse(
        _lines(first, events, req_id),
        headers=NDJSON,
        seconds=timeout + DEADLINE_MARGIN + STALL_SECONDS,
        last_words=_error_line(SHUTTING_DOWN, req_id),
        direct=direct,
    )


async def _lines(first: Batch, batches: AsyncGenerator[Batch, None], req_id: str) -> AsyncGenerator[bytes, None]:
    async with aclosing(batches):
        yield _spent(first)
        try:
            async for batch in guarded(batches):
                yield _spent(batch)
        except OctavoError as error:
            yield _error_line(error, req_id)


def _spent(batch: Batch) -> bytes:
    """The lines of a batch, which is empty then: everyone it went through holds it until its lines are written."""
    lines = _lines_of(batch)
    batch.clear()
    return lines


def _lines_of(batch: Batch) -> bytes:
    """A line a message, in one piece. What came as an object stands last in most batches, if there is one."""
    num_bare = next((at for at, (_, raw) in enumerate(batch) if raw is not None), len(batch))
    lines = _encoder.encode_lines([message for message, _ in batch[:num_bare]])
    for message, raw in batch[num_bare:]:
        lines += _encoder.encode_lines([message]) if raw is None else raw[: raw.rindex(b"}")] + _GOOD
    return lines


def _error_line(error: OctavoError, req_id: str) -> bytes:
    return bytes(msgspec.json.encode({**error.as_native(req_id), "is_end": 1})) + b"\n"


async def _whole(batches: AsyncIterator[Batch], *, wants_usage: bool) -> dict[str, object]:
    """Collect a stream into one object: its last message, without what only streams need."""
    logprobs: list[object] = []
    kept: dict[str, object] = {}
    raw: bytes | None = None
    async for batch in batches:
        for message, raw in batch:
            if message.logprobs is not None:
                logprobs += msgspec.to_builtins(message.logprobs)
            if message.prompt is not None and raw is not None:
                kept = {name: value for name, value in msgspec.json.decode(raw).items() if name in _OF_THE_PROMPT}
    last = msgspec.json.decode(raw or b"{}")
    answer = {name: value for name, value in last.items() if name not in _STREAM_ONLY} | kept
    if logprobs:
        answer["logprobs"] = logprobs
    if not wants_usage:
        answer.pop("usage", None)
    return {**answer, "result": answer.get("tokens_all", ""), "error_msg": "", "error_code": 0}
