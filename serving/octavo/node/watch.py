"""A hang is a death: what a child that runs but does nothing looks like, and its end.

Node's event loop. Every child is watched while it runs: the engine by its heartbeats and its step's deadline, as the
front end tells of them, Triton and its stub by an answer to a question, a gateway worker by a byte that its loop
writes twice a second. One that is stopped by a signal is no use either. Starts nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine

from octavo.node import run_dir, triton
from octavo.node.children import Child, Children, process_end
from octavo.node.health import FRESH_SECONDS, Monitor, Observed, Upstream
from octavo.protocol.errors import OctavoError

log = logging.getLogger("octavo.node")

LOOK_SECONDS = 0.5  # at what node knows
STAT_SECONDS = 1.0  # at what the kernel says of a process
STOPPED_SECONDS = 8.0  # SIGSTOP; a debugger's stop is another state
ENGINE_SILENCE_SECONDS = 4.0  # of an engine without a running step; the front end gives it up after 3
STEP_MARGIN_SECONDS = 1.0  # past a step's deadline
LOAD_SILENCE_SECONDS = 300.0  # reading a large shard from a slow disk can take all of the interpreter
ANSWER_SECONDS = 8.0  # Triton and stub: for one question
ASK_SECONDS = 1.0  # without an answer to anybody, until one is asked here
BEAT_SILENCE_SECONDS = 5.0
BEAT_START_SECONDS = 60.0
TRITON_EXPLAINS_SECONDS = 5.0  # a Triton whose model cannot load says why and exits
TRITON_LOAD_SECONDS = 120.0  # from its start to its first answer; a stub that hangs never answers


class Beat:
    """The pipe on which a worker shows that its loop turns, says whether it reaches the model server (+ or -), and that
    a request has ended well (*): then `on_served` is called.
    """

    def __init__(self, *, clock: Callable[[], float], on_served: Callable[[], None] = lambda: None) -> None:
        self._clock = clock
        self._on_served = on_served
        self._read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._began = clock()
        self._heard_at: float | None = None
        self._reached: bool | None = None  # None: it has not said
        self._reached_at = 0.0

    def listen(self) -> None:
        """Once the child has its end."""
        os.close(self.write)
        asyncio.get_running_loop().add_reader(self._read, self._hear)

    def _hear(self) -> None:
        if words := os.read(self._read, 4096):
            self._heard_at = self._clock()
            for word in words:
                if word in b"+-":
                    self._reached, self._reached_at = word == ord("+"), self._heard_at
            if b"*" in words:
                self._on_served()
        else:  # the child is gone
            asyncio.get_running_loop().remove_reader(self._read)

    def reaches(self, *, since: float) -> bool:
        """Whether it has reached the model server since then, or has not said anything of it."""
        return self._reached is None or (self._reached and self._reached_at >= since)

    def trouble(self) -> str:
        """Why the worker must be taken for hung; empty if it need not."""
        limit = BEAT_START_SECONDS if self._heard_at is None else BEAT_SILENCE_SECONDS
        age = self._clock() - (self._began if self._heard_at is None else self._heard_at)
        return f"has not moved for {age:.1f} s" if age > limit else ""

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._read)
        os.close(self._read)


def engine_trouble(seen: Observed, *, started: float, now: float) -> str:
    """Why the engine that started then must be taken for hung; empty if it need not, or nobody can tell."""
    times, engine = seen.info.get("engine_times"), seen.info.get("engine")
    if now - seen.info_at > FRESH_SECONDS or not isinstance(times, dict):
        return ""
    heard_at, attached_at = float(times["heard_at"]), float(times["attached_at"])
    silence = now - max(heard_at, started)
    if attached_at <= started:  # it loads, or is in a long step of an earlier front end
        silence = min(silence, now - seen.front_end_at)
        return f"has been silent for {silence:.1f} s" if silence > LOAD_SILENCE_SECONDS else ""
    deadline = float(engine.get("step_deadline") or 0.0) if isinstance(engine, dict) else 0.0
    if silence <= ENGINE_SILENCE_SECONDS or now <= deadline + STEP_MARGIN_SECONDS:
        return ""
    late = f", {now - deadline:.1f} s past its step's deadline" if deadline > heard_at else ""
    return f"has been silent for {silence:.1f} s{late}"


class Watch:
    """Waits for the end of children, and brings it about for those that hang."""

    def __init__(self, *, children: Children, monitor: Monitor, upstream: Upstream, clock: Callable[[], float]) -> None:
        self._children = children
        self._monitor = monitor
        self._upstream = upstream
        self._clock = clock

    async def engine(self, child: Child) -> int:
        """Its exit code, once it has ended."""
        return await self._end_of(child, self._until(lambda: self._engine_trouble(child)))

    async def gateway(self, child: Child, beat: Beat) -> int:
        """Its exit code, once it has ended."""
        try:
            return await self._end_of(child, self._until(beat.trouble))
        finally:
            beat.close()

    async def triton(self, child: Child) -> int:
        """Its exit code, once it has ended. It would go on without its stub: it may not."""
        return await self._end_of(child, self._triton_trouble(child))

    async def _end_of(self, child: Child, trouble: Coroutine[object, object, str]) -> int:
        watches = [
            asyncio.create_task(self._end_on(child, trouble)),
            asyncio.create_task(self._end_on(child, self._stopped(child))),
        ]
        try:
            return await asyncio.shield(child.exited)
        finally:
            for watch in watches:
                watch.cancel()

    async def _end_on(self, child: Child, trouble: Coroutine[object, object, str]) -> None:
        child.trouble = await trouble
        log.warning("%s %s; killing it", child.program.name, child.trouble)
        self._children.signal_group(child, signal.SIGKILL)

    async def _until(self, look: Callable[[], str]) -> str:
        while not (trouble := look()):
            await asyncio.sleep(LOOK_SECONDS)
        return trouble

    async def _stopped(self, child: Child) -> str:
        """Wait until it has been stopped by a signal for too long."""
        since: float | None = None
        while True:
            if run_dir.process_stat(child.pid)[:1] != ["T"]:
                since = None
            elif since is None:
                since = self._clock()
            elif self._clock() - since > STOPPED_SECONDS:
                return f"has been stopped by a signal for {STOPPED_SECONDS:.0f} s"
            await asyncio.sleep(STAT_SECONDS)

    def _engine_trouble(self, child: Child) -> str:
        return engine_trouble(self._monitor.seen, started=child.started, now=self._clock())

    # ---- Triton

    async def _triton_trouble(self, child: Child) -> str:
        """Wait until something is wrong with Triton or its stub, and say what."""
        trouble = await self._stub_trouble(child)
        if not self._monitor.seen.ever_ready:
            await asyncio.wait({child.exited}, timeout=TRITON_EXPLAINS_SECONDS)
        return trouble

    async def _stub_trouble(self, child: Child) -> str:
        deadline = self._clock() + TRITON_LOAD_SECONDS
        while (stub := triton.find_stub(child.pid)) is None:
            if self._clock() > deadline:
                return "did not start its Python stub"
            await asyncio.sleep(0.05)
        ended = asyncio.create_task(process_end(stub))
        silent = asyncio.create_task(self._silence(child, deadline))
        try:
            await asyncio.wait({ended, silent}, return_when=asyncio.FIRST_COMPLETED)
            return "has lost its Python stub" if ended.done() else silent.result()
        finally:
            ended.cancel()
            silent.cancel()

    async def _silence(self, child: Child, deadline: float) -> str:
        """Wait until it leaves a question without an answer: one that was asked long ago, not many short ones.

        While the monitor's polls are answered there is nothing to ask: every question is work for Triton and its stub.
        """
        while self._monitor.seen.info_at < child.started:
            if self._clock() > deadline:
                return "never answered"
            await asyncio.sleep(LOOK_SECONDS)
        answered_at = self._clock()
        while (silence := self._clock() - answered_at) < ANSWER_SECONDS:
            answered_at = max(answered_at, self._monitor.seen.info_at)
            age = self._clock() - answered_at
            if age > ASK_SECONDS:
                with contextlib.suppress(OctavoError):
                    await self._upstream.ask({"op": "info"}, seconds=max(LOOK_SECONDS, ANSWER_SECONDS - age))
                    answered_at = self._clock()
            await asyncio.sleep(LOOK_SECONDS)
        return f"has not answered for {silence:.1f} s"
