"""Streams of token messages between upstream and the routes: the first message, several prompts at once, odd
failures.

Runs on the event loop of a gateway worker. Every generator here closes the ones it reads from, so that leaving any of
them aborts the requests behind it. Knows nothing of HTTP or of dialects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

from octavo.protocol.errors import InternalError, OctavoError

log = logging.getLogger("octavo.gateway")
T = TypeVar("T")


async def begin(events: AsyncGenerator[T, None]) -> T:
    """The first message, awaited before any header is sent. Closes the stream if it does not come."""
    try:
        return await anext(events)
    except StopAsyncIteration:
        raise InternalError("the model server sent no message") from None
    except BaseException:
        await events.aclose()
        raise


async def guarded(events: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The same messages; anything unforeseen becomes an InternalError, for after the first byte only the last line
    can say it.
    """
    try:
        async for event in events:
            yield event
    except OctavoError:
        raise
    except Exception as error:  # the gateway's edge, inside an answer that has begun
        log.exception("stream failed")
        raise InternalError("internal error; the server's log has it") from error


async def numbered(events: AsyncGenerator[T, None]) -> AsyncGenerator[tuple[int, T], None]:
    """The messages of a single prompt, as `merged` would number them."""
    async with aclosing(events):
        async for event in events:
            yield 0, event


async def merged(streams: Sequence[AsyncGenerator[T, None]], *, at_once: int) -> AsyncGenerator[tuple[int, T], None]:
    """Messages of several streams as they come, with the stream's number; at most `at_once` streams are open.

    The first error ends all. At most two messages per open stream are held.
    """
    queue: asyncio.Queue[tuple[int, T | BaseException | None]] = asyncio.Queue(2 * at_once)
    slots = asyncio.Semaphore(at_once)

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with slots, aclosing(stream):
                async for event in stream:
                    await queue.put((number, event))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.ensure_future(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            number, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                num_open -= 1
            else:
                yield number, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
