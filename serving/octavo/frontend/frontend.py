"""The front end: what stands between Triton and the engine. Builds its parts and starts its threads.

Threads: Triton's execute (puts into the inbox, answers quick ops), intake, link, delivery, sweeper. The registry's lock
is the only one they share. Construction returns at once; admission opens when the engine has attached and the tokenizer
is read.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue, SimpleQueue

from octavo.engine.fingerprint import fingerprint
from octavo.frontend.admission import Registry
from octavo.frontend.carriers import CarriedSink, Carrier, Carriers
from octavo.frontend.compose import Composer
from octavo.frontend.delivery import Delivery
from octavo.frontend.engine_link import EngineLink, Events
from octavo.frontend.engine_process import EngineProcess
from octavo.frontend.intake import Arrival, Intake
from octavo.frontend.metrics import Metrics, Page
from octavo.frontend.ops import QUICK, Ops
from octavo.frontend.sink import Sink, SinkClosed
from octavo.frontend.state import RequestState, TokenizerSlot
from octavo.frontend.sweeper import Sweeper
from octavo.protocol.carrier import ORDER_PREFIX
from octavo.protocol.errors import BodyTooLarge, Cancelled, OctavoError, Unavailable
from octavo.protocol.messages import EngineInfo, EngineStats, ToEngine
from octavo.protocol.native import decode_body
from octavo.settings import Settings
from octavo.text.tokenizer import Tokenizer, TokenizerError

log = logging.getLogger("octavo.frontend")

QUICK_BYTES = 4096  # a body with a quick op is not longer
END_SECONDS = 5.0


class FrontEnd:
    """`submit` takes bodies from any thread; `finalize` ends everything."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic,
                 tokenizer: Tokenizer | None = None, link: Callable[[Events], EngineLink] | None = None,
                 draw_seed: Callable[[], int] = lambda: secrets.randbits(63)) -> None:
        """`link` makes the way to the engine; by default ZeroMQ, with an engine of its own unless node has one."""
        self._settings = settings
        self._clock = clock
        self._slot = TokenizerSlot(tokenizer)
        self.metrics = Metrics()
        deliveries: Queue[list[RequestState] | Carrier | None] = Queue()  # a SimpleQueue may miss a time limit
        self._inbox: SimpleQueue[Arrival | None] = SimpleQueue()
        self.registry = Registry(
            batch_size=settings.batch_size, max_waiting=settings.max_cached_task_num, clock=clock,
            send=self._send_to_engine, wake=deliveries.put, usage=self.metrics.keys,
        )
        page = Page(self.metrics, model_name=settings.served_model_name, batch_size=settings.batch_size,
                    view=self._view)
        self._ops = Ops(settings, registry=self.registry, page=page, slot=self._slot, clock=clock)
        composer = Composer(text_of=self._text_of, last_only=settings.disable_streaming, clock=clock)
        self._delivery = Delivery(queue=deliveries, registry=self.registry, composer=composer, metrics=self.metrics,
                                  clock=clock)
        self._intake = Intake(
            settings, inbox=self._inbox, registry=self.registry, metrics=self.metrics, ops=self._ops, slot=self._slot,
            load=self._load_tokenizer, clock=clock, draw_seed=draw_seed,
        )
        self._deliveries = deliveries
        self._carriers = Carriers(wake=deliveries.put, submit=self._arrive, wake_up=self._wake_up, clock=clock)
        self._sweeper = Sweeper(registry=self.registry, clock=clock, sweep_carriers=self._carriers.sweep)
        self._link = link(self.registry) if link is not None else self._own_link()
        for part in (self._delivery, self._intake, self._sweeper, self._link):
            part.start()

    def submit(self, body: bytes | str, triton_id: str, sink: Sink) -> None:
        """Take one body. Never blocks for long and never raises; the answer goes to `sink`."""
        raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        if raw.startswith(ORDER_PREFIX) and self._carriers.follow(raw, sink):
            pass  # a body that is too large is refused to its own request, not to the stream
        elif len(raw) > QUICK_BYTES or b'"op"' not in raw or not self._answered(raw, triton_id, sink):
            self._arrive(raw, triton_id, sink)

    def _arrive(self, raw: bytes, triton_id: str, sink: Sink) -> None:
        if len(raw) > self._settings.max_body_bytes:
            message = f"the request ({len(raw)} bytes) exceeds MAX_BODY_BYTES ({self._settings.max_body_bytes})"
            self._intake.refuse(sink, BodyTooLarge(message), triton_id or None)
        else:
            self._inbox.put(Arrival(raw, triton_id, sink, self._clock()))

    def _wake_up(self, sink: CarriedSink) -> None:
        """A carried request is read again, or nobody waits for it any more."""
        for state in self.registry.all_requests():
            if state.sink is sink and sink.gone:
                self.registry.post(state, Cancelled("the receiver gave up"))
            elif state.sink is sink:
                self._deliveries.put([state])

    def _answered(self, raw: bytes, triton_id: str, sink: Sink) -> bool:
        """Answer a quick op at once: those must not wait behind a long prompt."""
        try:
            body = decode_body(raw)
            if body.get("op") not in QUICK:
                return False
            given = body.get("req_id")
            self._ops.answer(body, given if isinstance(given, str) and given else triton_id or None, sink)
        except OctavoError as error:
            self._intake.refuse(sink, error, triton_id or None)
        except SinkClosed:
            pass
        return True

    def finalize(self) -> None:
        """End every request with 503, then the threads, then an engine that is ours."""
        log.info("front end ending")
        self.registry.drain()
        self._intake.stop(END_SECONDS)
        for state in self.registry.all_requests():
            self.registry.post(state, Unavailable("the server is shutting down"))
        self._delivery.stop(END_SECONDS)
        self._carriers.end_all()
        self._sweeper.stop(END_SECONDS)
        self._link.close(END_SECONDS)
        log.info("front end ended")

    # ---- parts

    def _own_link(self) -> EngineLink:
        if self._settings.managed_by_node:
            return EngineLink(self._settings, events=self.registry, process=None, clock=self._clock)
        process = EngineProcess(self._settings, clock=self._clock)
        return EngineLink(self._settings, events=self.registry, process=process,
                          fingerprint=fingerprint(self._settings), clock=self._clock)

    def _send_to_engine(self, message: ToEngine) -> None:
        self._link.send(message)

    def _text_of(self, token_id: int) -> str:
        return self._slot.get().text_of(token_id)

    def _view(self) -> tuple[int, int, EngineInfo | None, EngineStats | None]:
        engine = self.registry.engine
        return (*self.registry.counts(), engine.info, engine.stats)

    def _load_tokenizer(self) -> None:
        """On the intake thread: reading a large vocabulary takes a second."""
        if self._slot.tokenizer is not None:
            return
        try:
            self._slot.tokenizer = Tokenizer.load(_model_folder(self._settings.model_dir))
        except TokenizerError as error:
            self._slot.failure = str(error)
            log.error("no tokenizer: %s", error)


def _model_folder(model_dir: str) -> Path:
    """The folder itself; of a hub id the files that were fetched before."""
    folder = Path(model_dir)
    if folder.is_dir() or model_dir.count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download  # only when a hub id asks for it

    try:
        return Path(snapshot_download(model_dir, local_files_only=True))
    except OSError as error:
        raise TokenizerError(f"MODEL_DIR={model_dir}: not fetched ({str(error)[:100]})") from None
