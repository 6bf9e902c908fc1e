"""The way to the model: one grpc.aio channel per gateway worker, and one stream on it that carries all requests.

Lives on the worker's event loop. Owns the channel, the carrier (carrier.py), what each running request has received
(resume.py) and the background tasks that abort what nobody waits for any more. A carrier that breaks is replaced, and
its requests are taken up again with the tokens received so far; a request that is left early is aborted by name.
Knows nothing of HTTP. Memory per request: its received token ids and a mailbox of about 32 KiB; what a slow reader has
not taken stays in the front end as token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial

import grpc
import msgspec
from tritonclient.grpc import service_pb2

from octavo.gateway.carrier import Carrier
from octavo.gateway.direct import Direct
from octavo.gateway.resume import Progress
from octavo.gateway.triton import METHOD, Lost, channel_options, failure_of, infer_request, payload_of
from octavo.protocol.answers import TokenMessage, Tokens, token_decoder
from octavo.protocol.carrier import Carried
from octavo.protocol.errors import InternalError, OctavoError, RequestTimeout, Unavailable, from_native

log = logging.getLogger("octavo.gateway")

DEADLINE_MARGIN = 10.0  # seconds that the front end has to answer its own timeout before the gateway does
HOLD_SECONDS = 10.0  # how long new requests wait for a server that went away
OUTAGE_SECONDS = 60.0  # how long a running request waits for a server that went away
GREET_SECONDS = 0.5
MAX_LOSSES = 3  # broken streams in a row without a token between them: the request may be what breaks it
CLOSE_SECONDS = 2.0  # for aborts that are under way when the worker ends
FINISH_SECONDS = 1.0  # for Triton to close a stream whose last message is here

ORDER_BYTES = 4096  # what the envelope of a request takes of a gRPC message

Event = tuple[TokenMessage, bytes] | tuple[Tokens, None]  # a message, and its JSON object if it came as one
Batch = list[Event]  # never empty; whoever gets one may empty it


class Upstream:
    """Streams requests to the model. `start` and `close` frame its life; both run on the event loop."""

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        clock: Callable[[], float],
        outage_seconds: float = OUTAGE_SECONDS,
    ) -> None:
        """`outage_seconds`: for how long a running request waits for a server that went away."""
        self._address = address
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self._outage_seconds = outage_seconds
        self._hold_seconds = min(HOLD_SECONDS, outage_seconds)
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_running = 0
        self.num_finished = 0  # requests that ended as they should
        self._answered = False  # ever
        self._away_since: float | None = None  # since when the server that once answered does not
        self._decoder = token_decoder()
        self._carrier: Carrier | None = None  # for the next request
        self._carriers: set[Carrier] = set()  # this one, and those that their last requests still use

    async def start(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._address, options=channel_options(self._max_message_bytes))
        self._stream = self._channel.stream_stream(
            METHOD,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._spawn(self._greet())

    async def close(self) -> None:
        """Wait briefly for requests that are being cancelled and for their aborts, then close the channel."""
        self._answered = True  # ends the greeting
        end = self._clock() + CLOSE_SECONDS
        while (self._num_running or self._tasks) and self._clock() < end:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(carrier.end() for carrier in self._carriers if carrier.usable))
        await self._channel.close()

    async def generate(
        self, request: Mapping[str, object], *, timeout: float, direct: Direct | None = None
    ) -> AsyncGenerator[Batch, None]:
        """Yield the token messages of a request, all that came since the last time; the last of a choice has is_end.

        `timeout` is the request's own, in seconds. Closing the generator cancels and aborts the request. Raises
        OctavoError: Unavailable if the server is down or stays away, RequestTimeout past the deadline, else what the
        front end says. What goes `direct`, while that is open, is not yielded.
        """
        self._num_running += 1
        owner = secrets.token_hex(8)
        progress = Progress({**request, "owner": owner})
        outage = Outage(self._clock, self._outage_seconds)
        deadline = self._clock() + timeout + DEADLINE_MARGIN
        try:
            while not progress.closed:
                try:
                    async with aclosing(self._attempt(progress, deadline, direct)) as batches:
                        async for batch in batches:
                            outage.over()
                            yield batch
                except Lost as lost:
                    hold = self._may_hold()
                    progress.lost(reached=lost.reached and (self._answered or not lost.refused))
                    delay = outage.delay(lost, progress, hold=hold)
                    log.warning("stream lost; trying again in %.1f s", delay)
                    await self._pause(delay, deadline)
        finally:
            self._num_running -= 1
            if not progress.closed:
                self._spawn(self._abort_quietly(request.get("req_id"), owner))

    async def _greet(self) -> None:
        """Learn that the server is there, so that its absence later is known as a loss."""
        while not self._answered:
            with contextlib.suppress(OctavoError):
                await self.ask({"op": "info"}, timeout=GREET_SECONDS)
                return
            await asyncio.sleep(GREET_SECONDS)

    def heard_within(self, seconds: float) -> bool:
        """Whether the model server has sent something to a running request so recently."""
        return self._carrier is not None and self._clock() - self._carrier.heard_at <= seconds

    def _note_answer(self) -> None:
        self._answered, self._away_since = True, None

    def _may_hold(self) -> bool:
        """Whether the server went away a moment ago: who comes now is held like those that were there."""
        if not self._answered:
            return False  # it is starting
        now = self._clock()
        self._away_since = now if self._away_since is None else self._away_since
        return now - self._away_since <= self._hold_seconds

    async def _attempt(self, progress: Progress, deadline: float, direct: Direct | None) -> AsyncGenerator[Batch, None]:
        """Send the request as it stands, yield what is new, end with the last word or raise."""
        seconds_left = deadline - self._clock()
        body = progress.resumption(seconds_left - DEADLINE_MARGIN)
        payload = msgspec.json.encode(body)
        if len(payload) > self._max_message_bytes - ORDER_BYTES:
            progress.closed = True
            raise InternalError("the request is too large for the model server")
        carrier = self._usable_carrier()
        take_at_once = None if direct is None else partial(self._take_at_once, direct, progress)
        box = carrier.send(payload, seconds=seconds_left, take_at_once=take_at_once)
        try:
            while not progress.closed:
                batch, error = self._read(await box.take(), progress)
                if batch:
                    yield batch
                if error is not None:
                    raise error
        finally:
            carrier.leave(box, ended=progress.closed)

    def _take_at_once(self, direct: Direct, progress: Progress, messages: list[Carried]) -> bool:
        """Send new tokens on their short way, if it is open and there is nothing but tokens."""
        if not direct.ready or any([message.whole for message in messages]):
            return False
        batch, _ = self._read(messages, progress)
        if batch:
            direct.send(batch)
        return True

    def _usable_carrier(self) -> Carrier:
        carrier = self._carrier
        if carrier is not None and carrier.usable and not carrier.worn:
            return carrier
        if carrier is not None and carrier.usable:
            carrier.retire()
        self._carriers = {one for one in self._carriers if one.usable}
        self._carrier = Carrier(self._stream(), on_idle=self._end_carrier, clock=self._clock)
        self._carriers.add(self._carrier)
        return self._carrier

    def _end_carrier(self, carrier: Carrier) -> None:
        if self._carrier is carrier:
            self._carrier = None
        self._carriers.discard(carrier)
        self._spawn(carrier.end())

    def _read(self, messages: list[Carried], progress: Progress) -> tuple[Batch, Exception | None]:
        """What is new in these messages, and the error that ends them if one does."""
        batch: Batch = []
        req_id, seed = progress.req_id, progress.infer_seed
        for carried in messages:
            if not carried.whole:
                if progress.accept(carried):
                    tokens = Tokens(req_id, carried.token, carried.token_ids, carried.send_idx, 0, seed)
                    batch.append((tokens, None))
                continue
            try:
                event = self._whole(carried.whole, progress)
            except (Lost, OctavoError) as error:
                return batch, error
            req_id, seed = progress.req_id, progress.infer_seed
            if event is not None:
                batch.append(event)
        return batch, None

    def _whole(self, payload: bytes, progress: Progress) -> Event | None:
        """One message as OUT has it; None if it is a repeated one. Raises the error that a bare object stands for."""
        if not payload.startswith(b"["):
            error = from_native(_object(payload))
            if progress.held and isinstance(error, Unavailable):
                # The server that came back is still starting. A first attempt gets this as its answer.
                raise Lost(error.message, refused=True)
            progress.closed = True
            raise error
        try:
            (message,) = self._decoder.decode(payload)
        except (msgspec.MsgspecError, ValueError) as error:
            raise InternalError("the model server sent a message that cannot be read") from error
        self._note_answer()
        progress.req_id, progress.infer_seed = message.req_id, message.infer_seed
        if not progress.accept(message):
            return None
        self.num_finished += progress.closed and message.finish_reason != "cancelled"
        return message, payload[1:-1]

    async def _pause(self, delay: float, deadline: float) -> None:
        if self._clock() + delay >= deadline:
            raise RequestTimeout("the request's time is over")
        await asyncio.sleep(delay)

    async def ask(self, op: Mapping[str, object], *, timeout: float = 5.0) -> dict[str, object]:
        """Send an op and return its answer. Raises OctavoError, Unavailable if nothing answers in time."""
        call = self._stream(timeout=timeout)
        try:
            await _send(call, infer_request(msgspec.json.encode(op), str(op.get("req_id", ""))))
            payload = await _receive(call)
        except (Lost, RequestTimeout) as error:
            raise Unavailable("the model server does not answer") from error
        finally:
            self._spawn(_finish(call))
        answer = _object(payload)
        if answer.get("state") == "ready":
            self._note_answer()
        if answer.get("error_msg"):
            raise from_native(answer)
        return answer

    async def _abort_quietly(self, req_id: object, owner: str) -> None:
        """End our own request; one that has the same req_id, because ours was refused, goes on."""
        try:
            await self.ask({"op": "abort", "req_id": req_id, "owner": owner})
        except OctavoError as error:
            log.info("abort not delivered: %s", error.message)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run in the background, referenced until done."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Outage:
    """Whether a request goes on waiting for a server that went away, and how long until the next try."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self.over()

    def over(self) -> None:
        self._since: float | None = None
        self._losses = 0
        self._tries = 0

    def delay(self, lost: Lost, progress: Progress, *, hold: bool) -> float:
        """Seconds until the next try. Raises Unavailable if there should be none.

        `hold`: the server went away so recently that also a request that never reached it waits.
        """
        if not progress.reached and not hold:
            progress.closed = True
            raise Unavailable("the model server is not available")
        self._since = self._clock() if self._since is None else self._since
        self._losses += not lost.refused
        self._tries += 1
        if self._losses > MAX_LOSSES or self._clock() - self._since > self._seconds:
            progress.closed = True
            raise Unavailable("the model server went away and did not come back in time")
        return float(min(1.0, 0.05 * 2 ** min(self._tries, 5)))


async def _send(call: grpc.aio.StreamStreamCall, message: service_pb2.ModelInferRequest) -> None:
    try:
        await call.write(message)
        await call.done_writing()
    except grpc.aio.AioRpcError as error:
        raise failure_of(error) from None
    except (asyncio.InvalidStateError, grpc.aio.UsageError):
        raise Lost("the stream ended before it began", refused=True) from None


async def _receive(call: grpc.aio.StreamStreamCall) -> bytes:
    """The next payload, b"" at the end of the stream."""
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            if payload := payload_of(response):
                return payload
    except grpc.aio.AioRpcError as error:
        raise failure_of(error) from None
    return b""


async def _finish(call: grpc.aio.StreamStreamCall) -> None:
    """Let a stream end by itself: a cancellation after the last message would reach the model as one."""
    try:
        await asyncio.wait_for(call.read(), FINISH_SECONDS)
    except (grpc.aio.AioRpcError, asyncio.TimeoutError, asyncio.InvalidStateError):
        pass
    finally:
        call.cancel()


def _object(payload: bytes) -> dict[str, object]:
    try:
        answer = msgspec.json.decode(payload)
    except (msgspec.MsgspecError, ValueError):
        answer = None
    if isinstance(answer, dict):
        return answer
    raise InternalError("the model server sent a message that cannot be read")
