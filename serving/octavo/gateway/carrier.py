"""The worker's end of a carrier (protocol/carrier.py): one ModelStreamInfer stream for all its requests.

Lives on the worker's event loop: one task reads batches and puts each message into its request's mailbox, one writes
orders. Nothing here waits for whoever reads a mailbox; a mailbox that fills up has its request paused at the front
end. A stream that breaks fails every mailbox; an order that Triton could not pass on, the one it was about. Knows
nothing of HTTP or of what messages say.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable

import grpc
import msgspec
from tritonclient.grpc import service_pb2

from octavo.gateway.triton import Lost, failure_of, infer_request, payload_of
from octavo.protocol.carrier import Carried, Order, carried_decoder
from octavo.protocol.errors import InternalError, OctavoError, RequestTimeout

log = logging.getLogger(__name__)

FULL_BYTES = 32 << 10  # in a mailbox, until its request is paused
ENTRY_BYTES = 128  # what a message takes besides its text
IDLE_SECONDS = 1.0  # without requests, until the stream is closed: Triton does not end while one is open
WORN_BYTES = 4 << 20  # received on one stream: Triton keeps all of it until the stream ends
RESPONSE_BYTES = 512  # what Triton keeps of a response besides its payload
REPEAT_SECONDS = 0.2  # until an order that Triton could not pass on is given again
END_SECONDS = 1.0  # for Triton to close a stream that was asked to end


TakeAtOnce = Callable[[list[Carried]], bool]  # False: it did not, the mailbox keeps them


class Mailbox:
    """Messages of one request that nobody has taken yet, then perhaps why there will be no more."""

    __slots__ = (
        "_carrier",
        "_failure",
        "_messages",
        "_num_bytes",
        "_take_at_once",
        "_waiter",
        "paused",
        "tag",
        "timer",
    )

    def __init__(self, carrier: Carrier, tag: int, take_at_once: TakeAtOnce | None = None) -> None:
        self._carrier = carrier
        self._take_at_once = take_at_once
        self.tag = tag
        self.paused = False
        self.timer: asyncio.TimerHandle | None = None
        self._messages: list[Carried] = []
        self._num_bytes = 0
        self._failure: Lost | OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, messages: list[Carried]) -> None:
        """Add what came at once."""
        if messages[-1].more:
            self.paused = True  # by itself, until there is room for the next piece
        if self._waiter is not None:
            if self._waiter.done() or not self._taken_at_once(messages):
                self._messages += messages
                self._wake()
            return
        self._messages += messages
        self._num_bytes += sum([ENTRY_BYTES + len(message.token) + len(message.whole) for message in messages])
        if self._num_bytes > FULL_BYTES and not self.paused:
            self.paused = True
            self._carrier.order("pause", self.tag)

    def _taken_at_once(self, messages: list[Carried]) -> bool:
        if self._take_at_once is None:
            return False
        try:
            return self._take_at_once(messages)
        except Exception:  # the edge of the handler, whose work this is: other requests go on
            log.exception("messages cannot be passed on")
            self.fail(InternalError("internal error; the server's log has it"))
            return True

    def fail(self, failure: Lost | OctavoError) -> None:
        self._failure = self._failure or failure
        self._wake()

    def expire(self) -> None:
        """Its time is over; not if it waits for its reader: a connection that is not read has a bound of its own."""
        if not self.paused:
            self.fail(RequestTimeout("the request's time is over"))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[Carried]:
        """All messages there are, at least one. Raises Lost or OctavoError once there are no more."""
        if not self._messages and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        messages, self._messages, self._num_bytes = self._messages, [], 0
        if self.paused:
            self.paused = False
            self._carrier.order("resume", self.tag)
        if not messages:
            assert self._failure is not None
            raise self._failure
        return messages


class Carrier:
    """`send` opens mailboxes, `leave` closes them, `end` closes the stream; no `send` once it is not `usable`."""

    def __init__(
        self, call: grpc.aio.StreamStreamCall, *, on_idle: Callable[[Carrier], None], clock: Callable[[], float]
    ) -> None:
        self._call = call
        self._on_idle = on_idle
        self._clock = clock
        self.heard_at = float("-inf")  # when messages came last
        self._name = secrets.token_hex(8)
        self._boxes: dict[int, Mailbox] = {}
        self._last_tag = 0
        self._decode = carried_decoder().decode
        self._orders: deque[tuple[bytes, str]] = deque()
        self._ordered = asyncio.Event()
        self._ending = False
        self._retired = False
        self._num_bytes = 0
        self._idle: asyncio.TimerHandle | None = None
        self.usable = True  # until it breaks or is asked to end
        self.order("open")
        self._writing = asyncio.ensure_future(self._write_all())
        self._reading = asyncio.ensure_future(self._read_all())

    # ---- requests

    def send(self, body: bytes, *, seconds: float, take_at_once: TakeAtOnce | None = None) -> Mailbox:
        """Send a request; its mailbox fails with RequestTimeout after `seconds`. While somebody waits at the mailbox,
        messages are offered to `take_at_once`.
        """
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._last_tag += 1
        box = self._boxes[self._last_tag] = Mailbox(self, self._last_tag, take_at_once)
        box.timer = asyncio.get_running_loop().call_later(max(0.001, seconds), box.expire)
        self.order("carry", box.tag, body=body)
        return box

    def leave(self, box: Mailbox, *, ended: bool) -> None:
        """Nobody takes from this mailbox any more; unless its request has `ended`, the front end is told."""
        if box.timer is not None:
            box.timer.cancel()
        if self._boxes.pop(box.tag, None) is not None and not ended:
            self.order("leave", box.tag)
        self._rest()

    def _rest(self) -> None:
        """Without requests: wait a while for the next one, then let the owner end this."""
        if not self._boxes and self.usable and self._idle is None:
            seconds = 0.0 if self._retired else IDLE_SECONDS
            self._idle = asyncio.get_running_loop().call_later(seconds, self._on_idle, self)

    @property
    def worn(self) -> bool:
        """So much was received that the next requests should go to another one."""
        return self._num_bytes > WORN_BYTES

    def retire(self) -> None:
        """No `send` any more: end with the last request that is there."""
        self._retired = True
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._rest()

    def order(self, op: str, tag: int = 0, *, body: bytes = b"") -> None:
        """Put an order into the queue of what is written. Triton names it when it cannot pass it on."""
        if not self.usable and op != "end":
            return
        order = Order(self._name, op, tag, msgspec.Raw(body)) if body else Order(self._name, op, tag)
        self._orders.append((msgspec.json.encode(order), f"{op} {tag}"))
        self._ordered.set()

    # ---- the stream

    async def end(self) -> None:
        """Ask for the end of the stream and wait for it: one that is cancelled can keep Triton from stopping."""
        self.usable = False
        self.order("end")
        self._ending = True
        await asyncio.wait((self._reading,), timeout=END_SECONDS)
        self._call.cancel()
        await asyncio.gather(self._reading, self._writing, return_exceptions=True)

    async def _write_all(self) -> None:
        try:
            while True:
                while self._orders:
                    payload, name = self._orders.popleft()
                    await self._call.write(infer_request(payload, name))
                if self._ending:
                    await self._call.done_writing()
                    return
                self._ordered.clear()
                await self._ordered.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # the stream is over; the reader learns why
        except Exception:  # the edge of this task: whoever waits must hear
            log.exception("orders cannot be written")
            self._fail(Lost("orders cannot be written", refused=False))

    async def _read_all(self) -> None:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                if not response.error_message or not self._spare(response):
                    self._deliver(payload_of(response))
            self._fail(Lost("the stream ended early", refused=False))
        except grpc.aio.AioRpcError as error:
            self._fail(failure_of(error))
        except asyncio.CancelledError:  # by our own hand
            self._fail(Lost("the stream was closed", refused=False))
            raise
        except Lost as lost:
            self._fail(lost)
        except msgspec.MsgspecError:  # the front end has no such carrier, or does not know what one is
            self._fail(Lost("the stream is not carried on", refused=True, reached=True))
        except Exception:  # the edge of this task: whoever waits must hear
            log.exception("the stream cannot be read")
            self._fail(Lost("the stream cannot be read", refused=False))
        finally:
            self._writing.cancel()

    def _spare(self, response: service_pb2.ModelStreamInferResponse) -> bool:
        """Triton could not pass on an order. True if that was about one request, which takes the blow alone."""
        op, _, tag = response.infer_response.id.partition(" ")
        if op not in ("carry", "leave", "pause", "resume"):
            return False
        log.warning("the order %s failed: %s", op, response.error_message)
        box = self._boxes.get(int(tag))
        if op == "carry" and box is not None:
            box.fail(Lost(response.error_message, refused=True, reached=True))
        elif op != "carry":
            asyncio.get_running_loop().call_later(REPEAT_SECONDS, self._repeat, int(tag))
        return True

    def _repeat(self, tag: int) -> None:
        """Order again what should hold now."""
        box = self._boxes.get(tag)
        self.order("leave" if box is None else "pause" if box.paused else "resume", tag)

    def _deliver(self, payload: bytes) -> None:
        """Put a batch into mailboxes."""
        if not payload:
            return
        self._num_bytes += RESPONSE_BYTES + len(payload)
        self.heard_at = self._clock()
        by_tag: dict[int, list[Carried]] = {}
        for message in self._decode(payload):
            by_tag.setdefault(message.tag, []).append(message)
        for tag, messages in by_tag.items():
            box = self._boxes.get(tag)
            if box is not None:
                box.put(messages)

    def _fail(self, failure: Lost | OctavoError) -> None:
        """Nothing more comes from here."""
        self.usable = False
        if self._idle is not None:
            self._idle.cancel()
        boxes, self._boxes = self._boxes, {}
        for box in boxes.values():
            box.fail(failure)
        self._call.cancel()
