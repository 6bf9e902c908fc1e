"""What node knows of the server's health, and the pages that show it.

Node's event loop; reads states, starts and ends nothing.

`Monitor` polls the front end through Triton and the gateway through its port, and has one real token generated before
it says ready. `judge` turns what it saw into one state and one reason; it is pure. Triton's own health pages are never
believed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Protocol

from octavo import __version__
from octavo.node.pages import JSON, Handler, Page, ask
from octavo.protocol.errors import OctavoError, QueueFull

POLL_SECONDS = 0.6  # of the front end: a poll takes a few milliseconds of Triton, its stub and this process
GATEWAY_POLL_SECONDS = 1.0  # while it answers
AGAIN_SECONDS = 0.3  # of either, while it is not well
ANSWER_SECONDS = 1.0  # deadline of a poll
FRESH_SECONDS = 1.5  # how old the last good answer may be
GATEWAY_FRESH_SECONDS = 2.5
PROOF_SECONDS = 0.1  # pause between two tries for a token
PROBE_SECONDS = 60.0  # the first token after a start may be slow
STATES = ("starting", "loading", "ready", "draining", "down")

PROBE: dict[str, object] = {
    "input_ids": [0],
    "max_dec_len": 1,
    "temperature": 0,
    "ignore_eos": True,
    "priority": -100,
    "owner": "node",  # no user's: the front end does not count it as one that was served
}


class Upstream(Protocol):
    """What the monitor needs of `TritonClient`."""

    async def ask(self, body: dict[str, object], *, seconds: float) -> dict[str, object]: ...


@dataclass(frozen=True)
class Process:
    """One child as the pages show it."""

    name: str
    state: str  # running | stopped (SIGSTOP, a debugger) | dead
    pid: int | None
    restarts: int
    seconds: float  # since its start
    last_end: str = ""  # how the one before it ended
    reaches: bool = True  # of a gateway worker: false if it says that it does not reach the model server


@dataclass
class Observed:
    """What was last seen. Times are the clock's; 0 is never."""

    info: dict[str, object] = field(default_factory=dict)  # the last good answer to `info`
    info_at: float = 0.0
    info_from: tuple[int | None, ...] = ()  # the processes that it came through
    info_error: str = ""  # why the latest poll failed
    gateway_at: float = 0.0
    gateway_error: str = ""
    token_for: tuple[int | None, ...] = ()  # the processes that the last proving token came through
    token_error: str = ""
    ever_ready: bool = False
    draining: bool = False
    failed: str = ""  # why node gives up
    front_end_pid: int = 0
    front_end_at: float = 0.0  # when this front end was first seen
    num_finished: int = 0  # requests that it ended as it should
    finished_at: float = 0.0  # when such an end was last seen

    @property
    def front_end_failure(self) -> str:
        """Why the front end will never serve: another try would end the same way."""
        front_end = self.info.get("frontend")
        return str(front_end.get("failure") or "") if isinstance(front_end, dict) else ""

    def note_front_end(self, now: float) -> None:
        """Whether the last answer came from another front end, and whether requests have ended well."""
        front_end = self.info.get("frontend")
        if not isinstance(front_end, dict):
            return
        pid, num_finished = int(front_end.get("pid") or 0), int(front_end.get("finished") or 0)
        if pid != self.front_end_pid:
            self.front_end_pid, self.front_end_at, self.num_finished = pid, now, 0
        if num_finished > self.num_finished:
            self.num_finished, self.finished_at = num_finished, now


@dataclass(frozen=True)
class Verdict:
    """One word and one line."""

    state: str  # one of STATES
    reason: str = ""


def judge(seen: Observed, processes: list[Process], *, gateway: bool, now: float) -> Verdict:
    """The server's state: the first of its stages, from the outside in, that is not well gives the reason."""
    if seen.failed:
        return Verdict("down", f"giving up: {seen.failed}")
    if seen.draining:
        return Verdict("draining", "the server is draining")
    not_ready = "down" if seen.ever_ready else "starting"
    for process in processes:
        if process.state == "stopped":
            return Verdict(not_ready, f"{process.name} is stopped by a signal")
        if process.state != "running":
            return Verdict(not_ready, f"{process.name} is down; it is being restarted")
    if seen.info_from != token_source(processes) or now - seen.info_at > FRESH_SECONDS:
        age = f" for {now - seen.info_at:.1f} s" if seen.info_at else " yet"
        return Verdict(not_ready, f"the front end has not answered{age} ({seen.info_error or 'waiting'})")
    if (verdict := _judge_engine(seen, now)) is not None:
        return verdict
    if gateway and now - seen.gateway_at > GATEWAY_FRESH_SECONDS:
        return Verdict(not_ready, f"the HTTP gateway does not answer ({seen.gateway_error or 'waiting'})")
    if seen.token_for != token_source(processes):
        return Verdict(not_ready, f"waiting for a first token ({seen.token_error or 'asked for'})")
    for process in processes:
        if not process.reaches:
            return Verdict(not_ready, f"{process.name} does not reach the model server yet")
    return Verdict("ready")


def token_source(processes: list[Process]) -> tuple[int | None, ...]:
    """The processes that a token comes through; another one must prove itself again."""
    return tuple(process.pid for process in processes if not process.name.startswith("gateway"))


def _judge_engine(seen: Observed, now: float) -> Verdict | None:
    """What the front end says of itself and the engine; None if all is well."""
    state, reason = str(seen.info.get("state", "")), str(seen.info.get("reason") or "")
    if state == "loading":
        return Verdict("loading", f"loading {progress_text(seen.info)}")
    if state == "draining":
        return Verdict("draining", reason or "the server is draining")
    if state != "ready":
        final = seen.ever_ready or seen.front_end_failure
        return Verdict("down" if final else "starting", reason or "the engine is down")
    age = float(str(seen.info.get("engine_age") or 0)) + now - seen.info_at
    if age > FRESH_SECONDS and now > _step_deadline(seen.info):
        return Verdict("down", f"the engine has made no progress for {age:.1f} s")
    return None


def _step_deadline(info: dict[str, object]) -> float:
    engine = info.get("engine")
    return float(engine.get("step_deadline") or 0.0) if isinstance(engine, dict) else 0.0


def load_progress(info: dict[str, object]) -> tuple[str, float]:
    """Stage and fraction of loading; ("", 0) if nothing is known."""
    progress = info.get("progress")
    if not isinstance(progress, dict):
        return "", 0.0
    return str(progress.get("stage") or ""), float(progress.get("fraction") or 0.0)


def progress_text(info: dict[str, object]) -> str:
    """ "weights 43 %" """
    stage, fraction = load_progress(info)
    return f"{stage} {fraction * 100:.0f} %".strip()


class Monitor:
    """Polls for as long as node lives."""

    def __init__(
        self,
        upstream: Upstream,
        *,
        gateway: tuple[str, int] | None,
        processes: Callable[[], list[Process]],
        clock: Callable[[], float],
        gateway_tls: ssl.SSLContext | None = None,
    ) -> None:
        self.seen = Observed()
        self._upstream = upstream
        self._gateway = gateway
        self._gateway_tls = gateway_tls
        self._processes = processes
        self._clock = clock
        self._unproven = asyncio.Event()  # the front end answered through processes that gave no token yet

    def verdict(self) -> Verdict:
        """The state at this moment."""
        verdict = judge(self.seen, self._processes(), gateway=self._gateway is not None, now=self._clock())
        self.seen.ever_ready |= verdict.state == "ready"
        return verdict

    def work(self) -> list[Coroutine[object, object, None]]:
        """The polls; none of them returns."""
        gateway = [self.poll_gateway(*self._gateway)] if self._gateway is not None else []
        return [self.poll_front_end(), self.prove(), *gateway]

    async def poll_front_end(self) -> None:
        """Ask for `info` again and again."""
        while True:
            began, source = self._clock(), token_source(self._processes())
            try:
                info = await self._upstream.ask({"op": "info"}, seconds=ANSWER_SECONDS)
            except OctavoError as error:
                self.seen.info_error = error.message
            else:
                self.seen.info, self.seen.info_at, self.seen.info_from = info, self._clock(), source
                self.seen.info_error = ""
                self.seen.note_front_end(self._clock())
                if source != self.seen.token_for:
                    self._unproven.set()
            well = not self.seen.info_error and self.seen.info.get("state") == "ready"
            seconds = POLL_SECONDS if well else AGAIN_SECONDS
            await asyncio.sleep(max(0.05, seconds - (self._clock() - began)))

    async def prove(self) -> None:
        """Readiness is a token, not a claim: have one generated whenever Triton or the engine is a new process."""
        while True:
            await self._unproven.wait()
            source = token_source(self._processes())
            new = self.seen.info_from == source != self.seen.token_for
            if new and self.seen.info.get("state") == "ready" and await self._token():
                self.seen.token_for = source
            if self.seen.token_for == source:
                self._unproven.clear()
            await asyncio.sleep(PROOF_SECONDS)

    async def _token(self) -> bool:
        try:
            req_id = f"octavo-ready-{secrets.token_hex(8)}"  # no client can hold it
            await self._upstream.ask({**PROBE, "req_id": req_id}, seconds=PROBE_SECONDS)
        except QueueFull:
            pass  # an answer: the server is busy with real requests
        except OctavoError as error:
            self.seen.token_error = error.message
            return False
        self.seen.token_error = ""
        return True

    async def poll_gateway(self, host: str, port: int) -> None:
        """Ask the gateway again and again: any HTTP answer shows that a worker accepts. OPTIONS: an answer to GET would
        take a question to the model server, which each worker asks by itself (watch.Beat).
        """
        while True:
            try:
                await ask(host, port, "OPTIONS", "/health", seconds=ANSWER_SECONDS, tls=self._gateway_tls)
            except (OSError, asyncio.TimeoutError) as error:
                self.seen.gateway_error = type(error).__name__
            else:
                self.seen.gateway_at, self.seen.gateway_error = self._clock(), ""
            await asyncio.sleep(AGAIN_SECONDS if self.seen.gateway_error else GATEWAY_POLL_SECONDS)


def health_pages(
    monitor: Monitor, *, processes: Callable[[], list[Process]], about: dict[str, object]
) -> dict[str, Handler]:
    """Paths of HTTP_PORT. `about` are facts that do not change (model, ports, pid)."""

    async def live() -> Page:
        return Page("ok\n")

    async def ready() -> Page:
        verdict = monitor.verdict()
        if verdict.state == "ready":
            return Page("ready\n")
        return Page(f"{verdict.state}: {verdict.reason}\n", status=503, retry_after=2)

    async def health() -> Page:
        verdict = monitor.verdict()
        stage, fraction = load_progress(monitor.seen.info)
        body = {
            "ready": verdict.state == "ready",
            "state": verdict.state,
            "reason": verdict.reason,
            "version": __version__,
            "progress": {"stage": stage, "fraction": round(fraction, 4)},
            **about,
            "processes": [vars(process) for process in processes()],
            "model": monitor.seen.info.get("model"),
            "frontend": monitor.seen.info.get("frontend"),
            "engine": monitor.seen.info.get("engine"),
        }
        return Page(json.dumps(body, indent=1) + "\n", status=200 if body["ready"] else 503, content_type=JSON)

    return {"/v2/health/live": live, "/v2/health/ready": ready, "/v2/health": health}
