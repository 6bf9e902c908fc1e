"""The engine behind its socket: one ROUTER on loopback, answered while the model loads, between steps and while idle.

Runs on the engine process's main thread, which owns the socket and the core; loading runs on a second thread. One front
end is attached at a time: it holds the link key and the highest epoch. Messages of anybody else are dropped.

    load → serve ⟲ (drain the inbox, one turn of the core, publish) → end

Losing its front end frees the sequences; an engine of its own (not under node) then lingers and ends.
"""

from __future__ import annotations

import hmac
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq

from octavo.engine.core import Clock, EngineCore, incident_id
from octavo.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    Attach,
    Attached,
    FromEngine,
    Heartbeat,
    Loading,
    Ping,
    Refused,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
    encoder,
    engine_decoder,
)

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
LOST_SECONDS = 10.0  # without a message: peers send a Ping every second
LINGER_SECONDS = 60.0
MAX_MESSAGE_BYTES = 256 << 20
MAX_KNOWN_PEERS = 64

Progress = Callable[[str, float], None]
Load = Callable[[Progress], EngineCore]


class LoadFailed(Exception):
    """The model could not be loaded; `__cause__` says why."""


class Link:
    """The socket and the two codecs. Sending never blocks: what a gone peer would have got is dropped."""

    def __init__(self, *, port: int) -> None:
        """Binds 127.0.0.1:port (0: any). zmq.ZMQError if the port is taken."""
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 500), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)):
            self._socket.setsockopt(option, value)
        self._encode = encoder().encode
        self._decode = engine_decoder().decode
        try:
            self._socket.bind(f"tcp://127.0.0.1:{port}")
        except zmq.ZMQError:
            self.close()
            raise
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def receive(self, *, wait: float) -> list[tuple[bytes, ToEngine]]:
        """All messages that are there, after at most `wait` seconds for the first. Malformed ones are dropped."""
        messages: list[tuple[bytes, ToEngine]] = []
        if wait > 0 and not self._socket.poll(int(wait * 1000)):
            return messages
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT, copy=True)
            except zmq.Again:
                return messages
            try:
                peer, body = frames
                messages.append((peer, self._decode(body)))
            except (ValueError, msgspec.DecodeError) as error:
                log.warning("dropped a malformed message of %d frames: %s", len(frames), str(error)[:200])

    def send(self, peer: bytes, message: FromEngine) -> None:
        try:
            self._socket.send_multipart([peer, self._encode(message)], zmq.DONTWAIT)
        except zmq.Again:
            log.warning("dropped a message to a peer that does not read")

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@dataclass
class Peers:
    """Who may speak: the attached front end, those that wait for the load, and those that showed the key."""

    key: str
    attached: bytes | None = None
    epoch: int = -1  # the highest ever attached
    last_heard: float = 0.0
    lost_since: float | None = None  # since when nobody is attached, once loaded
    waiting: dict[bytes, Attach] = field(default_factory=dict)
    proven: dict[bytes, None] = field(default_factory=dict)  # showed the key; oldest first

    def refusal(self, peer: bytes, attach: Attach, *, fingerprint: str | None) -> Refused | None:
        """Why this peer may not attach. `fingerprint` is None while it is not known."""
        if not hmac.compare_digest(attach.key.encode(), self.key.encode()):
            return Refused("wrong key", "key")
        self.proven[peer] = None
        if len(self.proven) > MAX_KNOWN_PEERS:
            del self.proven[next(iter(self.proven))]
        if attach.version != PROTOCOL_VERSION:
            return Refused(f"protocol version {attach.version}; this engine speaks {PROTOCOL_VERSION}", "version")
        if attach.epoch < self.epoch or (attach.epoch == self.epoch and peer != self.attached):
            return Refused(f"epoch {attach.epoch} is fenced: epoch {self.epoch} was attached", "epoch")
        if fingerprint is not None and attach.fingerprint not in ("", fingerprint):
            return Refused(f"fingerprint mismatch: this engine runs {fingerprint}", "fingerprint")
        return None


@dataclass
class Stop:
    """Whether the process was asked to end. Set by signal handlers too, so a plain bool."""

    asked: bool = False


@dataclass
class Server:
    """The loop. `run` returns the exit code 0 when asked to end; LoadFailed if the model could not be loaded."""

    link: Link
    key: str
    load: Load
    clock: Clock
    managed_by_node: bool = False
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    lost_seconds: float = LOST_SECONDS
    linger_seconds: float = LINGER_SECONDS
    stop: Stop = field(default_factory=Stop)
    core: EngineCore | None = None
    _next_heartbeat: float = 0.0
    _progress: Loading = field(default_factory=lambda: Loading("start", 0.0))

    def __post_init__(self) -> None:
        self.peers = Peers(self.key)

    def request_stop(self) -> None:
        """End once the current step is over. Safe from other threads."""
        self.stop.asked = True

    @property
    def stopping(self) -> bool:
        return self.stop.asked

    def run(self) -> int:
        """Load, then serve until asked to end or abandoned."""
        core = self._load()
        if core is None:
            return 0
        self.core = core
        self.peers.lost_since = self.clock()
        for peer, attach in sorted(self.peers.waiting.items(), key=lambda item: item[1].epoch):
            self._attach(core, peer, attach)
        try:
            self._serve(core)
        finally:
            core.runner.close()
        return 0

    # ---- loading

    def _load(self) -> EngineCore | None:
        """The core, loaded on a second thread while peers are told how far it is; None if asked to end meanwhile."""
        results: queue.SimpleQueue[EngineCore | BaseException] = queue.SimpleQueue()
        thread = threading.Thread(target=self._load_into, args=(results,), name="load", daemon=True)
        thread.start()
        while not self.stopping:
            for peer, message in self.link.receive(wait=0.05):
                self._hear_while_loading(peer, message)
            if not results.empty():
                return self._loaded(results.get())
            if self.clock() >= self._next_heartbeat:
                self._next_heartbeat = self.clock() + self.heartbeat_seconds
                for peer in self.peers.waiting:
                    self.link.send(peer, self._progress)
        return None

    def _load_into(self, results: queue.SimpleQueue[EngineCore | BaseException]) -> None:
        try:
            results.put(self.load(self._note_progress))
        except BaseException as error:  # handed to the main thread, which raises it
            results.put(error)

    def _note_progress(self, stage: str, fraction: float) -> None:
        self._progress = Loading(stage, min(max(fraction, 0.0), 1.0))

    def _loaded(self, result: EngineCore | BaseException) -> EngineCore:
        if isinstance(result, EngineCore):
            return result
        for peer in self.peers.waiting:
            self.link.send(peer, Refused(f"the model could not be loaded: {result}", "load"))
        raise LoadFailed(str(result)) from result

    def _hear_while_loading(self, peer: bytes, message: ToEngine) -> None:
        if isinstance(message, Attach):
            refusal = self.peers.refusal(peer, message, fingerprint=None)
            if refusal is None:
                self.peers.waiting[peer] = message
                self.link.send(peer, self._progress)
            else:
                self._refuse(peer, refusal)
        elif isinstance(message, Shutdown) and peer in self.peers.proven:
            self.request_stop()

    # ---- serving

    def _serve(self, core: EngineCore) -> None:
        unchecked = False
        while not self.stopping:
            self._publish(core, self._hear_all(core, wait=0.0 if core.has_work else self._idle_wait()))
            if core.has_work:
                self._turn(core)
                unchecked = True
            elif unchecked and self.clock() - core.last_progress > self.heartbeat_seconds:
                core.scheduler.check_idle()  # wrong books could give wrong answers: better to end
                unchecked = False
            self._watch_front_end(core)
            self._beat(core)
        self._publish(core, core.abort_all())

    def _idle_wait(self) -> float:
        return min(self.heartbeat_seconds, max(self._next_heartbeat - self.clock(), 0.001))

    def _turn(self, core: EngineCore) -> None:
        try:
            outputs = core.turn()
        except Exception:  # the edge: nothing is known of the runner any more, so the process ends
            log.exception("the engine failed, id %s", incident_id())
            raise  # and the front end replays its sequences in the next one: no error is theirs
        if outputs:
            self._publish(core, outputs)
        else:
            self._next_heartbeat = 0.0  # progress, or the deadline of a first step

    def _publish(self, core: EngineCore, outputs: list[SequenceOutput]) -> None:
        if outputs and self.peers.attached is not None:
            self.link.send(self.peers.attached, StepOutputs(outputs, core.stats()))
            self._next_heartbeat = self.clock() + self.heartbeat_seconds

    def _beat(self, core: EngineCore) -> None:
        now = self.clock()
        if self.peers.attached is not None and now >= self._next_heartbeat:
            self.link.send(self.peers.attached, Heartbeat(core.stats()))
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self.heartbeat_seconds

    def _hear_all(self, core: EngineCore, *, wait: float) -> list[SequenceOutput]:
        """Act on all messages that are there; outputs of sequences that ended without a step."""
        outputs: list[SequenceOutput] = []
        for peer, message in self.link.receive(wait=wait):
            if isinstance(message, Attach):
                self._attach(core, peer, message)
            elif isinstance(message, Shutdown) and peer in self.peers.proven:
                log.info("asked to end")
                self.request_stop()
            elif peer != self.peers.attached:
                self._turn_away(peer, message)
            else:
                self.peers.last_heard = self.clock()
                outputs += self._hear(core, message)
        return outputs

    def _turn_away(self, peer: bytes, message: ToEngine) -> None:
        """A peer that is not attached. One that showed the key once learns that it no longer is."""
        log.warning("dropped a %s of a peer that is not attached", type(message).__name__)
        if peer in self.peers.proven:
            self.link.send(peer, Refused("not attached", "detached" if self.peers.attached is None else "epoch"))

    def _hear(self, core: EngineCore, message: ToEngine) -> list[SequenceOutput]:
        if isinstance(message, Submit):
            try:
                return core.add(message)
            except ValueError as error:
                log.error("dropped a submit: %s", error)
        elif isinstance(message, Abort):
            return core.abort(message.seq_ids)
        elif isinstance(message, Ping) and self.peers.attached is not None:
            self.link.send(self.peers.attached, Heartbeat(core.stats(), message.nonce))
        return []

    # ---- front ends

    def _attach(self, core: EngineCore, peer: bytes, attach: Attach) -> None:
        peers = self.peers
        info = core.runner.info
        refusal = peers.refusal(peer, attach, fingerprint=info.fingerprint)
        if refusal is not None:
            self._refuse(peer, refusal)
            return
        if attach.epoch > peers.epoch:
            core.abort_all()  # their owner is gone or fenced: nobody is told
        if peers.attached is not None and peers.attached != peer:
            self._refuse(peers.attached, Refused(f"fenced by epoch {attach.epoch}", "epoch"))
        peers.attached, peers.epoch = peer, attach.epoch
        peers.last_heard, peers.lost_since = self.clock(), None
        log.info("front end attached, epoch %d", attach.epoch)
        self.link.send(peer, Attached(PROTOCOL_VERSION, info, core.stats()))

    def _refuse(self, peer: bytes, refusal: Refused) -> None:
        log.warning("front end refused: %s", refusal.reason)
        self.link.send(peer, refusal)

    def _watch_front_end(self, core: EngineCore) -> None:
        """Free the sequences of a front end that went silent; end some time after, unless node decides that."""
        peers, now = self.peers, self.clock()
        if peers.attached is not None:
            if now - peers.last_heard <= self.lost_seconds:
                return
            log.warning("the front end has been silent for %.0f s; its sequences are freed", now - peers.last_heard)
            core.abort_all()
            peers.attached, peers.lost_since = None, now
        if not self.managed_by_node and peers.lost_since is not None and now - peers.lost_since > self.linger_seconds:
            log.info("no front end for %.0f s: ending", self.linger_seconds)
            self.request_stop()
