"""The link to the engine: one thread, one ZeroMQ DEALER at a time.

The thread connects, attaches with the key from the run directory, then moves messages both ways until the engine goes
away, and begins again. It owns the socket; others put messages into an outbox and wake it. What it hears it tells the
registry; it knows no requests. A new socket for each session, and a higher epoch, make late messages harmless.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from octavo.frontend.engine_process import EngineProcess
from octavo.protocol.messages import (
    PROTOCOL_VERSION,
    Attach,
    Attached,
    EngineInfo,
    EngineStats,
    Heartbeat,
    Loading,
    Ping,
    Refused,
    Shutdown,
    StepOutputs,
    ToEngine,
    encoder,
    frontend_decoder,
)
from octavo.settings import Settings

PING_SECONDS = 1.0
SILENCE_SECONDS = 3.0
RETRY_SECONDS = 0.1
POLL_MS = 100
ATTACHED_POLL_MS = 250  # whatever comes or is to be sent ends it
LINGER_MS = 500  # for a last Shutdown
MAX_RECEIVE = 64  # messages before the outbox is looked at again


class Events(Protocol):
    """What the link tells; called on its thread, must not block."""

    def on_loading(self, stage: str, fraction: float) -> None: ...
    def on_attached(self, info: EngineInfo, stats: EngineStats, epoch: int, *, same_engine: bool) -> None: ...
    def on_detached(self, reason: str, *, for_good: bool = False) -> None: ...
    def on_stats(self, stats: EngineStats) -> None: ...
    def on_step(self, step: StepOutputs) -> None: ...


class SessionOver(Exception):
    """The engine is gone; the message says how that was noticed."""


class Silent(SessionOver):
    """The engine overran its step's deadline, or says nothing: a hang is a death."""


class Fenced(SessionOver):
    """A front end with a higher epoch took the engine."""


class EngineLink:
    """`start`, `send` from any thread, `close`."""

    def __init__(self, settings: Settings, *, events: Events, process: EngineProcess | None,
                 fingerprint: str = "", clock: Callable[[], float] = time.monotonic,
                 epoch: Callable[[], int] = time.time_ns) -> None:
        """`process`: None if the engine is someone else's to start. `epoch` must rise from call to call.

        An engine with another `fingerprint` is not used; if engines are this link's to start, it is told to end.
        """
        self._address = f"tcp://127.0.0.1:{settings.infer_queue_port}"
        self._key_path = settings.run_dir / "engine.key"
        self._events = events
        self._process = process
        self._fingerprint = fingerprint
        self._clock = clock
        self._epoch = epoch
        self._context = zmq.Context()
        self._outbox: deque[ToEngine] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._attached_key = ""  # of the engine that was attached last: each engine has a key of its own
        self._thread = threading.Thread(target=self._run, name="octavo-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        """Put a message into the outbox; lost if the engine goes away before it is sent."""
        self._outbox.append(message)
        if len(self._outbox) == 1:
            os.eventfd_write(self._wake, 1)

    def close(self, timeout: float) -> None:
        """End the thread. An engine that this link started is told to end, and waited for."""
        if self._process is not None:
            self.send(Shutdown())
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout)
        if self._process is not None:
            self._process.end(timeout)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._session()
            except Fenced as reason:
                self._events.on_detached(str(reason), for_good=True)
                return
            except SessionOver as reason:
                self._events.on_detached(str(reason))
                if isinstance(reason, Silent) and self._process is not None:
                    self._process.kill()  # under node, that is node's to do
                self._outbox.clear()  # nobody adds to it any more: the registry knows
                time.sleep(RETRY_SECONDS)
            failure = self._process.ensure() if self._process is not None and not self._closing else None
            if failure is not None:
                self._events.on_detached(failure, for_good=True)
                return

    def _session(self) -> None:
        key = self._read_key()
        socket = self._context.socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            socket.setsockopt(option, 0)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            socket.connect(self._address)
            _Session(self, socket, monitor, key).run()
        finally:
            socket.disable_monitor()
            socket.close(linger=LINGER_MS)

    def _read_key(self) -> str:
        try:
            key = self._key_path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            key = ""
        if not key:
            raise SessionOver("waiting for the engine to start")
        return key


class _Session:
    """One connection: from Attach to the loss of the engine. Link thread only."""

    def __init__(self, link: EngineLink, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], key: str) -> None:
        self._link = link
        self._socket = socket
        self._monitor = monitor
        self._key = key
        self._epoch = link._epoch()
        self._encode = encoder().encode
        self._decode = frontend_decoder().decode
        self._attached = False
        self._heard_at = self._pinged_at = link._clock()
        self._step_deadline = 0.0
        self._nonce = 0
        self._poller = zmq.Poller()
        for source in (socket, monitor, link._wake):
            self._poller.register(source, zmq.POLLIN)

    def run(self) -> None:
        """Raises SessionOver; returns if the link is being closed."""
        self._socket.send(self._encode(Attach(PROTOCOL_VERSION, self._key, self._epoch, self._link._fingerprint)))
        while True:
            ready = dict(self._poller.poll(ATTACHED_POLL_MS if self._attached else POLL_MS))
            if self._link._wake in ready:
                os.eventfd_read(self._link._wake)
            if self._socket in ready:
                self._receive()
            if self._monitor in ready:
                recv_monitor_message(self._monitor)
                raise SessionOver("the engine closed the connection")
            if self._attached:
                self._send_outbox()
                self._watch()
            else:
                self._watch_start()
            if self._link._closing:
                return

    def _receive(self) -> None:
        for _ in range(MAX_RECEIVE):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = self._decode(frame)
            except msgspec.MsgspecError as error:
                raise SessionOver(f"the engine sent what cannot be read: {error}") from None
            self._heard_at = self._link._clock()
            self._handle(message)

    def _handle(self, message: Attached | Refused | Loading | StepOutputs | Heartbeat) -> None:
        events = self._link._events
        if isinstance(message, StepOutputs):
            self._step_deadline = message.stats.step_deadline
            events.on_step(message)
        elif isinstance(message, Heartbeat):
            self._step_deadline = message.stats.step_deadline
            events.on_stats(message.stats)
        elif isinstance(message, Loading):
            events.on_loading(message.stage, message.fraction)
        elif isinstance(message, Refused):
            self._refused(message)
        else:
            self._attach(message)

    def _refused(self, message: Refused) -> None:
        if self._attached and message.code == "epoch":
            raise Fenced(f"the engine refused: {message.reason}")
        if self._link._process is not None and message.code in ("version", "fingerprint"):
            self._socket.send(self._encode(Shutdown()))  # left by an earlier server with other settings
        raise SessionOver(f"the engine refused: {message.reason}")

    def _attach(self, message: Attached) -> None:
        if message.version != PROTOCOL_VERSION:
            raise SessionOver(f"the engine speaks version {message.version} of the protocol, not {PROTOCOL_VERSION}")
        self._attached = True
        if self._link._process is not None:
            self._link._process.settled()
        same_engine = self._key == self._link._attached_key
        self._link._attached_key = self._key
        self._link._events.on_attached(message.info, message.stats, self._epoch, same_engine=same_engine)

    def _send_outbox(self) -> None:
        outbox = self._link._outbox
        while outbox:
            self._socket.send(self._encode(outbox[0]))
            outbox.popleft()  # after the send: `send` wakes only an empty outbox

    def _watch(self) -> None:
        """Ask for a sign of life; silence beyond what the running step is allowed means it is gone."""
        now = self._link._clock()
        if now - self._pinged_at > PING_SECONDS:
            self._pinged_at = now
            self._nonce += 1
            self._socket.send(self._encode(Ping(self._nonce)))
        if now - self._heard_at > SILENCE_SECONDS and now > self._step_deadline:
            raise Silent(f"the engine was silent for {now - self._heard_at:.1f} s")

    def _watch_start(self) -> None:
        """While nothing answers: a new key means a new engine; a child that died must be started again."""
        process = self._link._process
        if process is not None and not process.running and self._link._clock() - self._heard_at > RETRY_SECONDS:
            raise SessionOver("the engine is starting")
        if self._link._read_key() != self._key:
            raise SessionOver("the engine is starting")
