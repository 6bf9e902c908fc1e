"""The parent of all: engine, tritonserver, gateway workers.

One process, one event loop, main thread only (guard.py says why).

start: everything at once, each with its own log. run: a task keeps each child alive; a child that dies again and again
ends node. drain (SIGTERM, SIGINT; a second one hurries): readiness goes first, then admission closes, running requests
end, then gateway, Triton and engine go. What a child does is not known here; what it means for users is health.py's.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial

from octavo.node import run_dir
from octavo.node.children import Child, Children, exit_text
from octavo.node.deaths import Deaths
from octavo.node.errors import EXIT_BAD_SETTINGS, NodeError
from octavo.node.health import Monitor, Process, health_pages
from octavo.node.logs import LogFile, last_error, progress_step, watch_logs
from octavo.node.metrics import NodeMetrics, metrics_pages
from octavo.node.pages import PageServer
from octavo.node.ports import free_port
from octavo.node.programs import Plan
from octavo.node.tls import own_tls
from octavo.node.triton_client import TritonClient
from octavo.node.watch import Beat, Watch
from octavo.protocol.errors import OctavoError

log = logging.getLogger("octavo.node")

MAX_DEATHS = 5  # within a minute and without a request that ended well: that is enough
MAX_DEATHS_BEFORE_READY = 3
GIVE_UP_SECONDS = 3.0  # in which everybody is told why the server ends by itself
SETTLE_SECONDS = 5.0  # at the end, for whatever still runs in the loop
STOP_SECONDS = {"gateway": 10.0, "triton": 8.0, "engine": 10.0}
ENGINE_FINAL_CODES = (2, 3, 4)  # bad model, port, lock: a second try would end the same way


class Supervisor:
    """One server's life. `run` returns the exit code."""

    def __init__(self, plan: Plan, *, clock: Callable[[], float] = time.monotonic) -> None:
        settings = plan.settings
        self._plan = plan
        self._settings = settings
        self._clock = clock
        self._children = Children(clock=clock, on_change=self._record)
        self._current: dict[str, Child] = {}
        self._deaths = {name: Deaths() for name in plan.names}
        self._stop = asyncio.Event()  # asked to end
        self._hurry = asyncio.Event()  # asked twice
        echo, everything = (_print, True) if plan.follow else (log.warning, False)
        self._logs = [LogFile(name, path, echo=echo, everything=everything) for name, path in plan.logs.items()]
        self._secret = secrets.token_hex(16)
        self._triton_metrics: int | None = None
        self._upstream = TritonClient(settings.local_target(settings.grpc_port))
        gateway = (settings.local_address, settings.push_mode_http_port) if plan.gateway_socket else None
        self.monitor = Monitor(
            self._upstream, gateway=gateway, processes=self.processes, clock=clock, gateway_tls=own_tls(settings)
        )
        self._watch = Watch(children=self._children, monitor=self.monitor, upstream=self._upstream, clock=clock)
        self._beats: dict[str, Beat] = {}  # by worker
        self._metrics = NodeMetrics(model=settings.served_model_name, max_waiting=settings.max_cached_task_num)

    # ---- life

    async def run(self) -> int:
        """Start everything, keep it alive until asked to end, drain, end. Raises NodeError if it cannot go on."""
        self._children.open()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_stop_signal)
        servers = await self._open_pages()
        tasks = [asyncio.create_task(work) for work in self._work()]
        try:
            await self._until_asked(tasks)
            await self._drain()
            return 0
        except NodeError as error:
            await self._give_up(str(error))
            raise
        finally:
            for task in tasks:
                task.cancel()
            await settle(tasks)
            await self._end_all()
            for one in self._logs if self._plan.follow else ():
                one.look()  # what the children said at their end
            for server in servers:
                server.close()

    def _work(self) -> list[Coroutine[object, object, None]]:
        """What goes on for as long as node lives; none of it returns."""
        return [
            self._keep("engine", self._start_engine, self._watch.engine),
            self._keep("triton", self._start_triton, self._wait_triton),
            *(
                self._keep(name, partial(self._start_gateway, name), self._wait_gateway)
                for name in self._plan.gateway_names
            ),
            *self.monitor.work(),
            watch_logs([*self._logs, LogFile("node", self._settings.log_dir / "node.log", echo=None)]),
            self._announce(),
        ]

    async def _until_asked(self, tasks: list[asyncio.Task[None]]) -> None:
        """Return when asked to end; raise what ended a task."""
        asked = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        for task in done - {asked}:
            task.result()

    def _on_stop_signal(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()
        self.monitor.seen.draining = True

    async def _announce(self) -> None:
        """Log each change of state and each tenth of loading; give up if the first ready does not or cannot come."""
        began, said = self._clock(), ""
        while True:
            verdict = self.monitor.verdict()
            if (failure := self.monitor.seen.front_end_failure) and not self.monitor.seen.ever_ready:
                raise NodeError(failure, exit_code=EXIT_BAD_SETTINGS)
            loading = progress_step(verdict.reason) if verdict.state == "loading" else ""
            if verdict.state + loading != said:
                said = verdict.state + loading
                log.info("state: %s%s", verdict.state, f" ({verdict.reason})" if verdict.reason else "")
            if not self.monitor.seen.ever_ready and self._clock() - began > self._settings.start_seconds:
                raise NodeError(f"not ready within START_SECONDS={self._settings.start_seconds}: {verdict.reason}")
            await asyncio.sleep(0.5 if self.monitor.seen.ever_ready else 0.2)

    async def _open_pages(self) -> list[asyncio.Server]:
        health = health_pages(self.monitor, processes=self.processes, about=self._plan.about)
        metrics = metrics_pages(
            self._metrics,
            monitor=self.monitor,
            upstream=self._upstream,
            triton_port=lambda: self._triton_metrics,
            processes=self.processes,
        )
        return [
            await PageServer(health).start(self._plan.health_socket),
            await PageServer(metrics).start(self._plan.metrics_socket),
        ]

    # ---- children

    async def _keep(self, name: str, start: Callable[[], Child], wait: Callable[[Child], Awaitable[int]]) -> None:
        """Start a child, and again whenever it dies. Raises NodeError when there is no sense in another try."""
        while True:
            child = self._current[name] = start()
            code = await wait(child)
            delay = self._next_start(name, child, code)
            self._metrics.restarts.labels(name).inc()
            await asyncio.sleep(delay)

    def _next_start(self, name: str, child: Child, code: int) -> float:
        """Seconds to wait before the next start. Raises NodeError if there will be none."""
        reason = last_error(child.program.log, child.log_offset)
        never_ready = not self.monitor.seen.ever_ready
        if name == "engine" and never_ready and code in ENGINE_FINAL_CODES:
            raise NodeError(reason or f"the engine ended with {exit_text(code)}", exit_code=code)
        limit = MAX_DEATHS_BEFORE_READY if never_ready else MAX_DEATHS
        deaths = self._deaths[name]
        deaths.last = f"killed: it {child.trouble}" if child.trouble else exit_text(code)
        delay = deaths.record(self._clock(), limit=limit, served_at=self.monitor.seen.finished_at)
        if delay is None:
            reason = reason or "it said nothing"
            raise NodeError(f"{name} died {limit} times in a row, last with {deaths.last}: {reason}")
        log.warning("%s died (%s); starting it again", name, deaths.last)
        return delay

    def _start_engine(self) -> Child:
        return self._children.spawn(self._plan.engine)

    def _start_gateway(self, name: str) -> Child:
        beat = self._beats[name] = Beat(clock=self._clock, on_served=self._note_served)
        try:
            return self._children.spawn(self._plan.gateway(name, beat=beat.write))
        finally:
            beat.listen()

    def _start_triton(self) -> Child:
        run_dir.remove_shared_memory(self._plan.shm_prefix)
        self._triton_metrics = free_port()
        return self._children.spawn(self._plan.triton(metrics_port=self._triton_metrics, secret=self._secret))

    async def _wait_gateway(self, child: Child) -> int:
        return await self._watch.gateway(child, self._beats[child.program.name])

    async def _wait_triton(self, child: Child) -> int:
        code = await self._watch.triton(child)
        run_dir.remove_shared_memory(self._plan.shm_prefix)
        return code

    # ---- end

    async def _drain(self) -> None:
        """Close admission and wait until nothing runs, DRAIN_SECONDS have passed, or asked again."""
        deadline = self._clock() + self._settings.drain_seconds
        log.info("draining for up to %d s", self._settings.drain_seconds)
        while self._clock() < deadline and not self._hurry.is_set():
            try:
                await self._upstream.ask({"op": "drain"}, seconds=1.0)
                info = await self._upstream.ask({"op": "info"}, seconds=1.0)
            except OctavoError as error:
                if not self.monitor.seen.ever_ready or "triton" not in self._running_names():
                    return
                log.warning("draining: %s", error.message)
                info = {}
            front_end = info.get("frontend")
            if isinstance(front_end, dict) and not any(map(front_end.get, ("running", "waiting", "unread"))):
                return
            await asyncio.sleep(0.1)
        log.warning("not every request ended in time; ending them")
        await self._end_requests("the server is shutting down")

    async def _end_requests(self, reason: str) -> None:
        """Every request ends now, with 503 and the reason; new ones get the same answer."""
        with suppress(OctavoError):
            await self._upstream.ask({"op": "drain", "end": True, "reason": reason}, seconds=1.0)

    async def _give_up(self, reason: str) -> None:
        """Tell everybody why, before the server ends by itself."""
        self.monitor.seen.failed = reason
        if self.monitor.seen.ever_ready:
            log.error("giving up: %s", reason)
            began = self._clock()
            while self._clock() - began < GIVE_UP_SECONDS and not self._stop.is_set():
                await self._end_requests(f"the server gives up: {reason}")
                await asyncio.sleep(0.2)

    async def _end_all(self) -> None:
        """Gateway first (answers that are under way get out), then Triton and the engine together."""
        if self._plan.gateway_socket is not None:
            self._plan.gateway_socket.close()  # who connects now is refused, and does not wait for nobody
        for group in (("gateway",), ("triton", "engine")):
            ending = [
                self._children.end(child, seconds=0.0 if self._hurry.is_set() else STOP_SECONDS[kind])
                for child in self._children.running
                for kind in group
                if child.program.name.startswith(kind)
            ]
            await asyncio.gather(*ending)
        await settle([asyncio.ensure_future(self._upstream.close())])
        run_dir.remove_shared_memory(self._plan.shm_prefix)

    # ---- facts

    def _running_names(self) -> set[str]:
        return {child.program.name for child in self._children.running}

    def processes(self) -> list[Process]:
        """Every child that there should be."""
        return [self._process(name, self._current.get(name)) for name in self._plan.names]

    def _process(self, name: str, child: Child | None) -> Process:
        deaths = self._deaths[name]
        if child is None or not child.running:
            return Process(name, "dead", None, deaths.total, 0.0, deaths.last)
        stopped = run_dir.process_stat(child.pid)[:1] in (["T"], ["t"])
        seconds = round(self._clock() - child.started, 1)
        state, beat = "stopped" if stopped else "running", self._beats.get(name)
        triton = self._current.get("triton")
        reaches = beat is None or triton is None or beat.reaches(since=triton.started)
        return Process(name, state, child.pid, deaths.total, seconds, deaths.last, reaches)

    def _note_served(self) -> None:
        self.monitor.seen.finished_at = self._clock()

    def _record(self) -> None:
        """Tell the stop command what runs."""
        children = tuple(found for child in self._children.running if (found := run_dir.ProcessId.of(child.pid)))
        self._plan.write_record(children)


def _print(line: str) -> None:
    print(line, flush=True)


async def settle(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for tasks that are about to end, but not for ever: a connection that does not close is no reason to stay."""
    done, _ = await asyncio.wait(tasks, timeout=SETTLE_SECONDS)
    for task in done:
        if not task.cancelled():
            task.exception()  # it was seen where it mattered


async def supervise(plan: Plan) -> int:
    """One server's life, inside the loop it runs in. Raises NodeError."""
    return await Supervisor(plan).run()
