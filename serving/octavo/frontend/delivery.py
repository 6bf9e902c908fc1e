"""The delivery thread: tokens to text, stop strings, messages, the end of every request.

It alone owns the output of sequences and it alone sends after a request was accepted. For each request with something
pending it sends one message a choice, however many tokens came since the last one: one token a message while it keeps
up. A request whose reader is behind says nothing until that one asks, and then goes on in pieces. A request ends here:
its req_id is free before its last message, which has the FINAL flag, leaves.

What goes to a carrier is collected while there is something to deliver, and leaves as a batch when there is nothing
any more, but not sooner after the last batch than PACE_SECONDS for each request that it spoke for: a batch costs the
gateway a write for each of them, and engines with steps shorter than that would have it pay for each step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable
from queue import Empty, Queue

import msgspec

from octavo.frontend import reporting
from octavo.frontend.admission import Registry
from octavo.frontend.carriers import CarriedSink, Carrier
from octavo.frontend.compose import Composer, encode_logprobs
from octavo.frontend.metrics import Metrics
from octavo.frontend.sink import Sink, SinkClosed
from octavo.frontend.state import Finish, RequestState, SequenceState
from octavo.protocol.answers import TokenOut, encode_error
from octavo.protocol.errors import Cancelled, InternalError, OctavoError
from octavo.protocol.messages import SequenceOutput

log = logging.getLogger("octavo.frontend")

PACE_SECONDS = 0.00025  # per request in the last batch
MAX_PACE_SECONDS = 0.02
MANY_OUTPUTS = 16  # of a request at once: perhaps too much for one message
OVERDUE_SECONDS = 0.01  # a batch does not wait longer for the queue to become empty


class Delivery:
    """One thread over one queue of requests, those of a step together, and of carriers that have something to send."""

    def __init__(self, *, queue: Queue[list[RequestState] | Carrier | None], registry: Registry,
                 composer: Composer, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._registry = registry
        self._composer = composer
        self._metrics = metrics
        self._clock = clock
        self._encoder = msgspec.json.Encoder()
        self._loaded: list[Carrier] = []  # with messages that wait for the next batch
        self._flush_at = 0.0  # not before
        self._overdue_at = 0.0
        self._thread = threading.Thread(target=self._run, name="octavo-delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Serve what is queued, then end."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, Carrier):
                self._load(item)
            else:
                self.serve(item)
        self._flush()

    def _next(self) -> list[RequestState] | Carrier | None:
        """What to look at next. On the way carriers are flushed: nothing is to be delivered now, or they waited."""
        while self._loaded:
            now = self._clock()
            try:
                if now < self._overdue_at:
                    return self._queue.get_nowait()
            except Empty:
                with contextlib.suppress(Empty):
                    if now < self._flush_at:
                        return self._queue.get(timeout=self._flush_at - now)
            self._flush()
        return self._queue.get()

    def _load(self, carrier: Carrier) -> None:
        if not self._loaded:
            self._overdue_at = max(self._clock(), self._flush_at) + OVERDUE_SECONDS
        self._loaded.append(carrier)

    def _flush(self) -> None:
        loaded, self._loaded = self._loaded, []
        count = sum(carrier.flush() for carrier in loaded)
        self._flush_at = self._clock() + min(MAX_PACE_SECONDS, PACE_SECONDS * count)

    def serve(self, states: list[RequestState]) -> None:
        """Deliver what is pending of these requests."""
        for state, outputs, verdict in self._registry.take(states):
            if not state.done:
                self._serve(state, outputs, verdict)

    def _serve(self, state: RequestState, outputs: list[tuple[SequenceState, SequenceOutput]],
               verdict: OctavoError | None) -> None:
        """One request. The edge of Triton's execute: here any failure becomes an error."""
        sink = state.sink
        try:
            if verdict is None and isinstance(sink, CarriedSink) and sink.keeps_up and _are_plain(outputs):
                self._pass_on(state, sink, outputs)
            else:
                self._advance(state, outputs, verdict)
        except SinkClosed:
            self._end_unheard(state)
        except Exception:
            error = self._internal(state)
            if not state.done:
                self._fail(state, error)

    def _advance(self, state: RequestState, outputs: list[tuple[SequenceState, SequenceOutput]],
                 verdict: OctavoError | None) -> None:
        if len(outputs) > MANY_OUTPUTS and isinstance(state.sink, CarriedSink):
            state.sink.behind = True  # as far as this thread knows
        for sequence, output in outputs:
            if sequence.finish is None:
                error = self._feed(state, sequence, output)
                verdict = error or verdict
        if verdict is not None and any(not sequence.closed for sequence in state.sequences):
            if not isinstance(verdict, Cancelled):
                self._fail(state, verdict)
                return
            self._cancel(state)
        self._send(state)

    def _pass_on(self, state: RequestState, sink: CarriedSink,
                 outputs: list[tuple[SequenceState, SequenceOutput]]) -> None:
        """The common case on a carrier: nothing but new tokens of the only choice."""
        sequence = state.sequences[0]
        if sequence.finish is not None:
            self._send(state)
            return
        feed = sequence.output.feed
        for _, output in outputs:
            for token_id in output.token_ids:
                if feed(token_id):
                    self._stop(sequence)
                    self._send(state)
                    return
        self._send_tokens(state, sequence, sink)

    def _stop(self, sequence: SequenceState) -> None:
        """A stop string was found."""
        sequence.end_token = None
        sequence.finish = Finish("stop", sequence.output.stopped_by)
        self._registry.abandon(sequence)

    def _feed(self, state: RequestState, sequence: SequenceState, output: SequenceOutput) -> OctavoError | None:
        """Bring a sequence forward by what the engine said of it."""
        reason, token_ids = output.finish_reason, output.token_ids
        if output.scheduled_at and not sequence.scheduled_at:
            self._note_scheduled(state, sequence, output)
        if reason == "stop" and token_ids:
            sequence.end_token, token_ids = token_ids[-1], token_ids[:-1]
        if output.logprobs is not None:
            sequence.logprobs += map(encode_logprobs, output.logprobs[: len(token_ids)])
        feed = sequence.output.feed
        for token_id in token_ids:
            if feed(token_id):
                self._stop(sequence)
                return None
        return self._finish(sequence, output, reason) if reason is not None else None

    def _finish(self, sequence: SequenceState, output: SequenceOutput, reason: str) -> OctavoError | None:
        if reason == "stop" or reason == "length":
            close(sequence, Finish(reason, sequence.end_token))
            return None
        log.error("engine error for sequence %d: %s", sequence.seq_id, reporting.clean_message(output.error or ""))
        return InternalError(f"the engine failed on this request: {output.error or 'unknown error'}")

    def _note_scheduled(self, state: RequestState, sequence: SequenceState, output: SequenceOutput) -> None:
        sequence.scheduled_at = output.scheduled_at
        sequence.cached_tokens = output.cached_tokens
        sequence.prompt_logprobs = output.prompt_logprobs
        self._metrics.queue_time.observe(max(0.0, output.scheduled_at - state.arrival))

    def _cancel(self, state: RequestState) -> None:
        """What was generated so far is the answer."""
        for sequence in state.sequences:
            if sequence.finish is None:
                close(sequence, Finish("cancelled"))

    # ---- sending

    def _send(self, state: RequestState) -> None:
        """One message for each choice that has something to say; the last one frees the req_id first."""
        sink = state.sink
        if isinstance(sink, CarriedSink):
            if sink.paused and not sink.cancelled():
                return  # what it has to say stays here, its end too
            if sink.behind and self._send_piece(state, sink):
                return
            if sink.bare and state.sequences[0].finish is None:
                self._send_tokens(state, state.sequences[0], sink)
                return
        self._send_all(state, sink)

    def _send_piece(self, state: RequestState, sink: CarriedSink) -> bool:
        """To a reader that may be behind: a piece of what there is, and on from there when it asks. False if all there
        is fits one piece.
        """
        limit = self._composer.piece_tokens(state)
        if sum(sequence.output.num_free for sequence in state.sequences) <= limit:
            sink.behind = False
            return False
        sequence = next(sequence for sequence in state.sequences if sequence.output.has_free)
        message = self._composer.next_message(state, sequence, limit=limit)
        assert message is not None
        self._count(state, sequence, message)
        sink.send_piece(self._encoder.encode([message]))
        return True

    def _send_all(self, state: RequestState, sink: Sink) -> None:
        messages = []
        for sequence in state.sequences:
            message = self._composer.next_message(state, sequence)
            if message is not None:
                messages.append((sequence, message))
        over = all(sequence.closed for sequence in state.sequences)
        for place, (sequence, message) in enumerate(messages, 1):
            last = over and place == len(messages)
            if last:
                self._registry.release(state, finished=not state.was_cancelled)
            self._count(state, sequence, message)
            sink.send(self._encoder.encode([message]), last)
        if over:
            reporting.finished(state, error=None, now=self._clock())
        elif messages and isinstance(sink, CarriedSink):
            sink.bare = self._composer.is_bare(state)

    def _send_tokens(self, state: RequestState, sequence: SequenceState, sink: CarriedSink) -> None:
        if not sequence.output.has_free:
            return
        text, token_ids, _ = sequence.output.take()
        self._note_sent(state, sequence, len(token_ids), self._clock())
        self._metrics.messages += 1
        send_idx = sequence.send_idx
        sequence.send_idx = send_idx + 1
        sink.send_tokens(text, token_ids, send_idx)

    def _count(self, state: RequestState, sequence: SequenceState, message: TokenOut) -> None:
        """A message is about to be sent."""
        now = self._clock()
        if message.token_ids:
            self._note_sent(state, sequence, len(message.token_ids), now)
        if message.is_end:
            self._note_end(state, sequence, now)
        self._metrics.messages += 1

    def _note_sent(self, state: RequestState, sequence: SequenceState, count: int, now: float) -> None:
        if not sequence.first_sent_at:
            sequence.first_sent_at = now
            self._metrics.ttft.observe(now - state.arrival)
            if sequence.index == 0:
                self._metrics.prompt_tokens += len(state.prompt_ids)
        else:
            self._metrics.itl.observe((now - sequence.last_sent_at) / count, count)
        sequence.last_sent_at = now
        self._metrics.generation_tokens += count

    def _note_end(self, state: RequestState, sequence: SequenceState, now: float) -> None:
        self._metrics.e2e.observe(now - state.arrival)
        if sequence.finish is not None:
            self._metrics.finishes[sequence.finish.reason] += 1
            code = Cancelled.status if sequence.finish.reason == "cancelled" else 200
            self._metrics.requests[state.request.dialect, code] += 1

    def _fail(self, state: RequestState, error: OctavoError) -> None:
        self._registry.release(state)
        self._metrics.errors[error.status] += 1
        self._metrics.requests[state.request.dialect, error.status] += 1
        reporting.finished(state, error=error, now=self._clock())
        with contextlib.suppress(SinkClosed):
            state.sink.send(encode_error(error, state.req_id), True)

    def _end_unheard(self, state: RequestState) -> None:
        """The receiver is gone: nothing can be sent, all else is as after a cancellation."""
        if state.done:  # released for a last message that nobody took
            reporting.finished(state, error=Cancelled("the receiver is gone"), now=self._clock())
        else:
            self._registry.release(state)
            self._metrics.finishes["cancelled"] += 1
            self._metrics.requests[state.request.dialect, Cancelled.status] += 1
            reporting.finished(state, error=Cancelled("the receiver is gone"), now=self._clock())

    def _internal(self, state: RequestState) -> OctavoError:
        incident = uuid.uuid4().hex[:12]
        log.exception("request %s failed (incident %s)", reporting.clean(state.req_id), incident)
        return InternalError(f"internal error (incident {incident})")


def _are_plain(outputs: list[tuple[SequenceState, SequenceOutput]]) -> bool:
    """Whether they say nothing but a few tokens, of a request whose first message said when it was scheduled."""
    few = len(outputs) <= MANY_OUTPUTS
    return few and all([output.finish_reason is None and output.logprobs is None for _, output in outputs])


def close(sequence: SequenceState, finish: Finish) -> None:
    """No more tokens come: a stop string in the text held back still counts."""
    if sequence.output.finish():
        sequence.end_token = None
        finish = Finish("stop", sequence.output.stopped_by)
    sequence.finish = finish
