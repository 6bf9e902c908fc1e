"""The intake thread: from bytes to an accepted request or a refusal.

It parses, applies the template, tokenises, checks limits and admits, one request after another; tokenising lets other
threads run, so delivery goes on meanwhile. Refusals are sent from here: nothing was accepted yet. An accepted request
belongs to the registry.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from octavo.frontend import reporting
from octavo.frontend.admission import Registry
from octavo.frontend.lowering import Limits, Prompt, make_prompt, mix, sampling_params
from octavo.frontend.metrics import Metrics
from octavo.frontend.ops import Ops
from octavo.frontend.sink import Sink, SinkClosed
from octavo.frontend.state import Finish, RequestState, SequenceState, TokenizerSlot
from octavo.protocol.answers import encode_error
from octavo.protocol.errors import InternalError, InvalidRequest, OctavoError, RequestTimeout
from octavo.protocol.messages import EngineInfo, SamplingParams
from octavo.protocol.native import Request, decode_body, parse_request
from octavo.settings import Settings
from octavo.text.output import OutputText
from octavo.text.stop import StopStrings
from octavo.text.tokenizer import Tokenizer

log = logging.getLogger("octavo.frontend")


@dataclass(slots=True, frozen=True)
class Arrival:
    """A body as it came."""

    body: bytes
    triton_id: str
    sink: Sink
    time: float


class Intake:
    """One thread over one inbox. `draw_seed` gives seeds to requests without one."""

    def __init__(self, settings: Settings, *, inbox: SimpleQueue[Arrival | None], registry: Registry, metrics: Metrics,
                 ops: Ops, slot: TokenizerSlot, load: Callable[[], None], clock: Callable[[], float],
                 draw_seed: Callable[[], int]) -> None:
        self._settings = settings
        self._inbox = inbox
        self._registry = registry
        self._metrics = metrics
        self._ops = ops
        self._slot = slot
        self._load = load
        self._clock = clock
        self._draw_seed = draw_seed
        self._limits: tuple[EngineInfo, Limits] | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-intake", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        self._inbox.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        self._load()
        while (arrival := self._inbox.get()) is not None:
            self.handle(arrival)

    def handle(self, arrival: Arrival) -> None:
        """Accept or refuse one body. The edge of Triton's execute: here any failure becomes an error."""
        req_id: str | None = arrival.triton_id or None
        dialect = "native"
        try:
            body = decode_body(arrival.body)
            given = body.get("req_id")
            req_id = given if isinstance(given, str) and given else req_id
            dialect = "openai" if body.get("dialect") == "openai" else dialect
            if body.get("op") is not None:
                self._ops.answer(body, req_id, arrival.sink)
            else:
                self._accept(body, req_id, arrival)
        except OctavoError as error:
            self.refuse(arrival.sink, error, req_id, dialect=dialect)
        except SinkClosed:
            pass
        except Exception:
            incident = uuid.uuid4().hex[:12]
            log.exception("request %s failed (incident %s)", reporting.clean(req_id), incident)
            error = InternalError(f"internal error (incident {incident})")
            self.refuse(arrival.sink, error, req_id, dialect=dialect)

    def refuse(self, sink: Sink, error: OctavoError, req_id: str | None, *, dialect: str = "native") -> None:
        """Answer with an error, in one message."""
        self._metrics.errors[error.status] += 1
        self._metrics.requests[dialect, error.status] += 1
        reporting.refused(req_id, error)
        with contextlib.suppress(SinkClosed):
            sink.send(encode_error(error, req_id), True)

    def _accept(self, body: dict[str, Any], req_id: str | None, arrival: Arrival) -> None:
        request = parse_request(body)
        if req_id is None:
            raise InvalidRequest("req_id is needed, in IN or as the request id", field="req_id")
        self._registry.check_open(req_id, request)
        tokenizer, info = self._slot.get(), self._registry.engine.info
        assert info is not None  # admission is open
        limits = self._limits_for(info, tokenizer)
        if request.fingerprint is not None and request.fingerprint != info.fingerprint:
            message = "fingerprint: the tokens come from another model or other settings"
            raise InvalidRequest(message, field="fingerprint")
        prompt = make_prompt(request, tokenizer)
        params = sampling_params(request, len(prompt.token_ids), limits, tokenizer.defaults)
        if self._clock() > arrival.time + request.timeout:
            raise RequestTimeout(f"the request's time ({request.timeout:g} s) is over")
        self._registry.admit(self._state(request, req_id, arrival, prompt, params, tokenizer, info.fingerprint))

    def _limits_for(self, info: EngineInfo, tokenizer: Tokenizer) -> Limits:
        if self._limits is None or self._limits[0] is not info:
            self._limits = info, Limits.of(self._settings, info, tokenizer)
            if self._settings.max_seq_len > info.context_length:
                log.warning("MAX_SEQ_LEN=%d is lowered to the model's context, %d", self._settings.max_seq_len,
                            info.context_length)
        return self._limits[1]

    def _state(self, request: Request, req_id: str, arrival: Arrival, prompt: Prompt, params: SamplingParams,
               tokenizer: Tokenizer, fingerprint: str) -> RequestState:
        seed = mix(self._draw_seed() if request.infer_seed is None else request.infer_seed, 0)
        stops = StopStrings(request.stop) if request.stop else None
        prompt_text = None
        if request.return_prompt:
            prompt_text = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
        return RequestState(
            req_id=req_id, request=request, sink=arrival.sink, arrival=arrival.time,
            deadline=arrival.time + request.timeout, prompt_ids=prompt.token_ids, prompt_text=prompt_text, seed=seed,
            fingerprint=fingerprint,
            sequences=[self._sequence(request, index, params, seed, stops, tokenizer, prompt.plain)
                       for index in range(request.n)],
        )

    def _sequence(self, request: Request, index: int, params: SamplingParams, seed: int, stops: StopStrings | None,
                  tokenizer: Tokenizer, plain: bool) -> SequenceState:
        detokenizer = tokenizer.new_detokenizer(continues_text=plain)
        output = OutputText(detokenizer, stops=stops, min_tokens=params.min_tokens)
        generated: list[int] = []
        if request.generated_token_ids and not self._settings.disable_streaming:
            generated = request.generated_token_ids[index]
        sequence = SequenceState(index, _with_seed(params, mix(seed, index)), output, list(generated))
        if request.send_idx and generated:
            sequence.send_idx = request.send_idx[min(index, len(request.send_idx) - 1)]
        if generated:
            _resume(sequence, generated)
        return sequence


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**fields, "seed": seed})


def _resume(sequence: SequenceState, generated: list[int]) -> None:
    """Rebuild what was said; if that ends the sequence already, it is finished before it is submitted."""
    params, output = sequence.params, sequence.output
    last = generated[-1]
    at_end = last in params.end_token_ids and len(generated) >= params.min_tokens
    words = generated[:-1] if at_end else generated
    if output.replay(words[: params.max_tokens]):
        sequence.finish = Finish("stop", output.stopped_by)
    elif at_end:
        sequence.end_token = last
        sequence.finish = Finish("stop", last)
    elif len(generated) >= params.max_tokens:
        sequence.finish = Finish("length")
    if sequence.finish is not None:
        output.finish()
        output.take()  # a character that never became whole was shown with the last of these tokens
