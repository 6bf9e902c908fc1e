"""The OpenAI dialect: server-sent events, or one object; also native bodies that ask for OpenAI answers.

Handlers of a gateway worker. The shapes are protocol/openai_answers.py's, the fields protocol/openai.py's; here they
meet the streams of the model.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import takewhile

from starlette.requests import Request
from starlette.responses import Response

from octavo.gateway.context import Context
from octavo.gateway.direct import Direct
from octavo.gateway.native_routes import DEFAULT_TIMEOUT, inner_request, key_of, timeout_of, wants_stream
from octavo.gateway.responses import (
    SHUTTING_DOWN,
    SSE,
    STALL_SECONDS,
    StreamResponse,
    json_response,
    openai_error,
    while_connected,
)
from octavo.gateway.streams import begin, guarded, merged, numbered
from octavo.gateway.upstream import DEADLINE_MARGIN, Batch
from octavo.protocol.errors import Cancelled, OctavoError
from octavo.protocol.openai import CHAT, OpenAIRequest, parse
from octavo.protocol.openai_answers import Answer, error_event

Numbered = tuple[int, Batch]  # of the prompt with that number


async def answer_openai(request: Request, body: dict[str, object], context: Context, *, route: str) -> Response:
    """Answer an OpenAI body. Raises OctavoError before the first byte."""
    asked = parse(body, route)
    model = context.check_model(asked.model)
    answer_id = ("chatcmpl-" if route == CHAT else "cmpl-") + context.new_id()
    inner = [one | key_of(request) for one in _inner_requests(asked, answer_id, context)]
    answer = Answer(asked, answer_id=answer_id, model=model, created=int(context.wall_clock()))
    return await _answer(request, context, inner, answer, stream=asked.stream, timeout=DEFAULT_TIMEOUT)


async def answer_native_as_openai(
    request: Request, body: dict[str, object], context: Context, *, route: str
) -> Response:
    """Answer native fields in OpenAI shapes (response_type openai). Raises OctavoError before the first byte."""
    stream = wants_stream(body)
    model = context.check_model(body.get("model"))
    inner = inner_request(body, context) | key_of(request)
    n, logprobs = inner.get("n"), inner.get("logprobs")
    asked = OpenAIRequest(
        route=route,
        model=model,
        stream=stream,
        include_usage=body.get("return_usage") is True,
        continuous_usage=False,
        n=n if isinstance(n, int) and 1 <= n <= 128 else 1,
        echo=False,
        logprobs=logprobs if isinstance(logprobs, int) else None,
        only_prompt=False,
        bodies=[inner],
    )
    answer = Answer(asked, answer_id=str(inner["req_id"]), model=model, created=int(context.wall_clock()))
    return await _answer(request, context, [inner], answer, stream=stream, timeout=timeout_of(inner))


def _inner_requests(asked: OpenAIRequest, answer_id: str, context: Context) -> list[dict[str, object]]:
    """One request per prompt. Each gets the seed that was asked for, else one of its own."""
    single = len(asked.bodies) == 1
    return [
        {"infer_seed": context.draw_seed(), **body, "req_id": answer_id if single else f"{answer_id}-{number}"}
        for number, body in enumerate(asked.bodies)
    ]


async def _answer(
    request: Request, context: Context, inner: list[dict[str, object]], answer: Answer, *, stream: bool, timeout: float
) -> Response:
    single = len(inner) == 1
    direct = Direct(lambda batch: b"".join([answer.chunks(0, message) for message, _ in batch]))
    way = direct if single and stream else None
    streams = [context.upstream.generate(one, timeout=timeout, direct=way) for one in inner]
    batches = numbered(streams[0]) if single else merged(streams, at_once=context.settings.batch_size)
    if not stream:
        return json_response(await while_connected(request, _whole(batches, answer)))
    first = await while_connected(request, begin(batches))
    return StreamResponse(
        _events(first, batches, answer),
        headers=SSE,
        seconds=len(inner) * (timeout + DEADLINE_MARGIN) + STALL_SECONDS,
        last_words=error_event(openai_error(SHUTTING_DOWN)),
        direct=direct,
    )


async def _whole(batches: AsyncGenerator[Numbered, None], answer: Answer) -> bytes:
    async with aclosing(batches):
        async for number, batch in batches:
            for message, _ in batch:
                _check_cancelled(message.finish_reason)
                answer.add(number, message)
    return answer.whole()


async def _events(
    first: Numbered, batches: AsyncGenerator[Numbered, None], answer: Answer
) -> AsyncGenerator[bytes, None]:
    async with aclosing(batches):
        try:
            async for number, batch in guarded(_chain(first, batches)):
                chunks, cancelled = _spent(number, batch, answer)
                if chunks:
                    yield chunks
                if cancelled:
                    _check_cancelled("cancelled")
        except OctavoError as error:
            yield error_event(openai_error(error))
        else:
            yield answer.last_chunks()


def _spent(number: int, batch: Batch, answer: Answer) -> tuple[bytes, bool]:
    """The chunks of a batch up to a cancellation, and whether there is one. The batch is empty then: everyone it went
    through holds it until its chunks are written.
    """
    good = [message for message, _ in takewhile(lambda event: event[0].finish_reason != "cancelled", batch)]
    cancelled = len(good) < len(batch)
    batch.clear()
    return b"".join([answer.chunks(number, message) for message in good]), cancelled


async def _chain(first: Numbered, rest: AsyncIterator[Numbered]) -> AsyncGenerator[Numbered, None]:
    yield first
    async for event in rest:
        yield event


def _check_cancelled(finish_reason: str | None) -> None:
    """OpenAI has no finish reason for an abort; to its clients it is an error."""
    if finish_reason == "cancelled":
        raise Cancelled("the request was cancelled")
