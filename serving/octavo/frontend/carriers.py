"""Carriers: streams on which the front end answers many requests at once (protocol/carrier.py).

Orders come on Triton's execute thread, messages from the intake and delivery threads; the delivery thread flushes,
the sweeper asks whether a carrier's receiver is still there. Each carrier has a lock for what is pending and one for
sending. Knows nothing of what the messages say.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import msgspec

from octavo.frontend.sink import Sink, SinkClosed
from octavo.protocol.answers import encode_error
from octavo.protocol.carrier import MAX_WHOLE_BYTES, Carried, Order, carried_encoder, order_decoder
from octavo.protocol.errors import InternalError, InvalidRequest, Unavailable

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.5
IDLE_SECONDS = 10.0  # without a request, until a carrier is ended here: a worker ends its own after one
MAX_CARRIERS = 256  # far more than the workers of a gateway and what they have replaced
_LOST = encode_error(Unavailable("the carrier is closed"), None)
_FULL = encode_error(Unavailable("too many carriers are open"), None)
_TAKEN = encode_error(InvalidRequest("a carrier of this name is open"), None)
_UNKNOWN = encode_error(InvalidRequest("no carrier of this name is open"), None)
_LEFT = "nobody waits for this request"
BATCH_BYTES = 1 << 20  # of whole messages in one response


class Carrier:
    """Collects messages; `flush` sends them as one. `wake` is told when there is something to flush."""

    def __init__(self, sink: Sink, *, wake: Callable[[Carrier], None], now: float) -> None:
        self.used_at = now  # execute thread and sweeper
        self._sink = sink
        self._wake = wake
        self._encode = carried_encoder().encode
        self._lock = threading.Lock()  # of the pending messages
        self._sending = threading.Lock()  # keeps what was taken from them in order
        self._pending: list[Carried] = []
        self.sinks: dict[int, CarriedSink] = {}  # by tag; execute thread adds, any thread removes
        self.closed = False
        self.next_check = 0.0  # sweeper

    def put(self, message: Carried) -> None:
        """Append to what is pending. Raises SinkClosed."""
        with self._lock:
            if self.closed:
                raise SinkClosed("the carrier is closed")
            self._pending.append(message)
            first = len(self._pending) == 1
        if first:
            self._wake(self)

    def flush(self) -> int:
        """Send all that is pending; for how many requests. A receiver that is gone closes the carrier, which its
        requests notice.
        """
        with self._sending:
            with self._lock:
                messages, self._pending = self._pending, []
            for batch in _batches(messages):
                if self.closed:
                    break
                try:
                    self._sink.send(self._encode(batch), False)
                except SinkClosed:
                    self._close(_LOST)
                except Exception:  # the edge of the thread: this carrier's requests go on elsewhere, others as they are
                    log.exception("a carrier failed")
                    self._close(_LOST)
        return len({message.tag for message in messages})

    def end(self, *, last: bytes = b"") -> None:
        """Send what is pending, then let the stream end; with a `last` word if its receiver did not ask for that."""
        self.flush()
        with self._sending:
            self._close(last)

    def check(self) -> None:
        """Close it if its receiver is gone: a blocking round trip."""
        if not self.closed and self._sink.cancelled():
            self.end(last=_LOST)

    def _close(self, last: bytes) -> None:
        with self._lock:
            closed, self.closed = self.closed, True
            self._pending = []
        if closed:
            return
        try:
            self._sink.send(last, True)
        except SinkClosed:
            pass
        except Exception:  # as in `flush`
            log.exception("a carrier's last message failed")


def _batches(messages: list[Carried]) -> Iterator[list[Carried]]:
    """In order, none much larger than BATCH_BYTES: a message to a gateway has a size limit."""
    begin = size = 0
    for end, message in enumerate(messages, 1):
        size += len(message.whole)
        if size > BATCH_BYTES or end == len(messages):
            yield messages[begin:end]
            begin, size = end, 0


class CarriedSink:
    """The answers of one request on a carrier."""

    __slots__ = ("_carrier", "_tag", "bare", "behind", "gone", "paused")

    def __init__(self, carrier: Carrier, tag: int) -> None:
        self._carrier = carrier
        self._tag = tag
        self.bare = False  # delivery: tokens are enough from here on, the first message said the rest
        self.paused = False  # its reader is behind: nothing is sent
        self.behind = False  # it was, and much may be held back: it is sent in pieces, each asked for
        self.gone = False  # nobody waits for it

    def send(self, payload: bytes, final: bool) -> None:
        too_large = len(payload) > MAX_WHOLE_BYTES
        if too_large:
            payload = encode_error(InternalError(f"the answer has a message of {len(payload)} bytes"), None)
        if self.gone:
            raise SinkClosed(_LEFT)
        self._carrier.put(Carried(self._tag, whole=payload))
        if final or too_large:
            self._carrier.sinks.pop(self._tag, None)
            self.gone = self.gone or not final

    def send_tokens(self, token: str, token_ids: list[int], send_idx: int) -> None:
        """A message that says no more than this. Raises SinkClosed."""
        if self.gone:
            raise SinkClosed(_LEFT)
        self._carrier.put(Carried(self._tag, token, token_ids, send_idx))

    def send_piece(self, payload: bytes) -> None:
        """Send a message that is not the last of what is held back, and pause. Raises SinkClosed."""
        if self.gone:
            raise SinkClosed(_LEFT)
        self.paused = True  # before the reader can ask for more
        self._carrier.put(Carried(self._tag, whole=payload, more=True))

    @property
    def keeps_up(self) -> bool:
        """Its reader takes what comes, and tokens are enough for it."""
        return self.bare and not self.behind and not self.paused

    def cancelled(self) -> bool:
        return self.gone or self._carrier.closed


class Carriers:
    """All carriers of a front end. `submit` takes a request body with its sink, `wake_up` a sink that was paused."""

    def __init__(self, *, wake: Callable[[Carrier], None], submit: Callable[[bytes, str, Sink], None],
                 wake_up: Callable[[CarriedSink], None], clock: Callable[[], float]) -> None:
        self._wake = wake
        self._submit = submit
        self._wake_up = wake_up
        self._clock = clock
        self._decode = order_decoder().decode
        self._carriers: dict[str, Carrier] = {}

    def follow(self, raw: bytes, sink: Sink) -> bool:
        """Follow an order; False if it is none. Execute thread only."""
        try:
            order = self._decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False
        if order.op == "open":
            self._open(order.carrier, sink)
            return True
        carrier = self._carriers.get(order.carrier)
        if carrier is None or carrier.closed:
            self._answer(sink, b"" if order.op == "end" else _UNKNOWN)
            return True
        carrier.used_at = self._clock()
        self._answer(sink, b"")
        if order.op == "end":
            self._carriers.pop(order.carrier, None)  # the sweeper may have found its receiver gone
            carrier.end()
        else:
            self._on_request(carrier, order)
        return True

    def _open(self, name: str, sink: Sink) -> None:
        if name in self._carriers:
            self._answer(sink, _TAKEN)
        elif len(self._carriers) >= MAX_CARRIERS:
            self._answer(sink, _FULL)
        else:
            self._carriers[name] = Carrier(sink, wake=self._wake, now=self._clock())

    def _on_request(self, carrier: Carrier, order: Order) -> None:
        if order.op == "carry":
            sink = carrier.sinks[order.tag] = CarriedSink(carrier, order.tag)
            self._submit(bytes(order.body), "", sink)  # Triton's id is the order's
            return
        known = carrier.sinks.get(order.tag)
        if known is None:
            return  # it has ended meanwhile
        if order.op == "leave":
            known.gone = True
            carrier.sinks.pop(order.tag, None)
        known.behind = True
        known.paused = order.op == "pause"
        if not known.paused:
            self._wake_up(known)

    def _answer(self, sink: Sink, payload: bytes) -> None:
        with contextlib.suppress(SinkClosed):
            sink.send(payload, True)

    def sweep(self) -> None:
        """End the carriers whose receiver is gone, or that nobody uses. Sweeper thread only."""
        now = self._clock()
        for name, carrier in list(self._carriers.items()):
            if now >= carrier.next_check:
                carrier.next_check = now + CHECK_SECONDS
                carrier.check()
            if carrier.sinks:
                carrier.used_at = now
            elif now - carrier.used_at > IDLE_SECONDS:
                carrier.end()
            if carrier.closed:
                self._carriers.pop(name, None)

    def end_all(self) -> None:
        """The front end ends; receivers that are still there are told."""
        for carrier in list(self._carriers.values()):
            carrier.end(last=_LOST)
