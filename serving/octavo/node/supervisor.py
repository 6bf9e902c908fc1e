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
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine

from octavo.node import run_dir, triton
from octavo.node.children import Child, Children, exit_text, process_end
from octavo.node.errors import NodeError
from octavo.node.health import Monitor, Process, health_pages
from octavo.node.logs import LogFile, last_error, watch_logs
from octavo.node.metrics import NodeMetrics, metrics_pages
from octavo.node.pages import PageServer
from octavo.node.ports import free_port
from octavo.node.programs import Plan
from octavo.node.triton_client import TritonClient
from octavo.protocol.errors import OctavoError

log = logging.getLogger("octavo.node")

MAX_DEATHS = 5  # within DEATH_WINDOW; the next one ends node
MAX_DEATHS_BEFORE_READY = 3
DEATH_WINDOW = 60.0
TRITON_EXPLAINS_SECONDS = 5.0  # a Triton whose model cannot load says why and exits
TRITON_LOAD_SECONDS = 120.0  # from its start to its first answer; a stub that hangs never answers
STOP_SECONDS = {"gateway": 10.0, "triton": 8.0, "engine": 10.0}
ENGINE_FINAL_CODES = (2, 3, 4)  # bad model, port, lock: a second try would end the same way


class Deaths:
    """Recent deaths of one child: how long to wait before the next start, or that it is enough."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self.total = 0

    def record(self, now: float, *, limit: int) -> float | None:
        """Seconds to wait before a restart; None after `limit` deaths within the window."""
        self.total += 1
        self._times.append(now)
        while now - self._times[0] > DEATH_WINDOW:
            self._times.popleft()
        if len(self._times) >= limit:
            return None
        return min(5.0, 0.1 * 4.0 ** (len(self._times) - 1))


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
        self._secret = secrets.token_hex(16)
        self._triton_metrics: int | None = None
        self._upstream = TritonClient(settings.local_target(settings.grpc_port))
        gateway = (settings.local_address, settings.push_mode_http_port) if plan.gateway_socket else None
        self.monitor = Monitor(self._upstream, gateway=gateway, processes=self.processes, clock=clock)
        self._metrics = NodeMetrics(model=settings.served_model_name)

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
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_all()
            for server in servers:
                server.close()

    def _work(self) -> list[Coroutine[object, object, None]]:
        """What goes on for as long as node lives; none of it returns."""
        logs = [LogFile(name, path, echo=log.warning) for name, path in self._plan.logs.items()]
        logs.append(LogFile("node", self._settings.log_dir / "node.log", echo=None))
        return [
            self._keep("engine", self._start_engine, self._wait_child),
            self._keep("triton", self._start_triton, self._wait_triton),
            *(self._keep(name, self._gateway_starter(name), self._wait_child) for name in self._plan.gateway_names),
            *self.monitor.work(),
            watch_logs(logs),
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
        """Log each change of state; give up if the first ready does not come in time."""
        began, said = self._clock(), ""
        while True:
            verdict = self.monitor.verdict()
            if verdict.state != said:
                said = verdict.state
                log.info("state: %s%s", verdict.state, f" ({verdict.reason})" if verdict.reason else "")
            if not self.monitor.seen.ever_ready and self._clock() - began > self._settings.start_seconds:
                raise NodeError(f"not ready within START_SECONDS={self._settings.start_seconds}: {verdict.reason}")
            await asyncio.sleep(0.2)

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
        delay = self._deaths[name].record(self._clock(), limit=limit)
        if delay is None:
            raise NodeError(
                f"{name} died {limit} times in a row, last with {exit_text(code)}: {reason or 'it said nothing'}"
            )
        log.warning("%s died (%s); starting it again", name, exit_text(code))
        return delay

    def _start_engine(self) -> Child:
        return self._children.spawn(self._plan.engine)

    def _gateway_starter(self, name: str) -> Callable[[], Child]:
        return lambda: self._children.spawn(self._plan.gateway(name))

    def _start_triton(self) -> Child:
        run_dir.remove_shared_memory(self._plan.shm_prefix)
        self._triton_metrics = free_port()
        return self._children.spawn(self._plan.triton(metrics_port=self._triton_metrics, secret=self._secret))

    async def _wait_child(self, child: Child) -> int:
        return await asyncio.shield(child.exited)

    async def _wait_triton(self, child: Child) -> int:
        """Wait for its death; bring it about if its stub is dead or never answers (it would go on without one)."""
        watch = asyncio.create_task(self._end_without_stub(child))
        try:
            code = await asyncio.shield(child.exited)
        finally:
            watch.cancel()
        run_dir.remove_shared_memory(self._plan.shm_prefix)
        return code

    async def _end_without_stub(self, child: Child) -> None:
        trouble = await self._stub_trouble(child)
        if self.monitor.seen.info_at < child.started:
            await asyncio.wait({child.exited}, timeout=TRITON_EXPLAINS_SECONDS)
        log.warning("Triton's Python stub %s; ending Triton", trouble)
        self._children.signal_group(child, signal.SIGKILL)

    async def _stub_trouble(self, child: Child) -> str:
        """Wait until something is wrong with Triton's stub, and say what."""
        deadline = self._clock() + TRITON_LOAD_SECONDS
        while (stub := triton.find_stub(child.pid)) is None:
            if self._clock() > deadline:
                return "did not start"
            await asyncio.sleep(0.05)
        ended = asyncio.create_task(process_end(stub))
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=1.0)
                if self.monitor.seen.info_at < child.started and self._clock() > deadline:
                    return "never answered"
            return "died"
        finally:
            ended.cancel()

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
            if isinstance(front_end, dict) and not (front_end.get("running") or front_end.get("waiting")):
                return
            await asyncio.sleep(0.1)
        log.warning("not every request ended in time; ending them")

    async def _end_all(self) -> None:
        """Gateway first (answers that are under way get out), then Triton and the engine together."""
        for group in (("gateway",), ("triton", "engine")):
            ending = [
                self._children.end(child, seconds=0.0 if self._hurry.is_set() else STOP_SECONDS[kind])
                for child in self._children.running
                for kind in group
                if child.program.name.startswith(kind)
            ]
            await asyncio.gather(*ending)
        await self._upstream.close()
        run_dir.remove_shared_memory(self._plan.shm_prefix)

    # ---- facts

    def _running_names(self) -> set[str]:
        return {child.program.name for child in self._children.running}

    def processes(self) -> list[Process]:
        """Every child that there should be."""
        return [self._process(name, self._current.get(name)) for name in self._plan.names]

    def _process(self, name: str, child: Child | None) -> Process:
        restarts = self._deaths[name].total
        if child is None or not child.running:
            return Process(name=name, state="dead", pid=None, restarts=restarts, seconds=0.0)
        stopped = run_dir.process_stat(child.pid)[:1] in (["T"], ["t"])
        seconds = round(self._clock() - child.started, 1)
        return Process(
            name=name, state="stopped" if stopped else "running", pid=child.pid, restarts=restarts, seconds=seconds
        )

    def _record(self) -> None:
        """Tell the stop command what runs."""
        children = tuple(found for child in self._children.running if (found := run_dir.ProcessId.of(child.pid)))
        self._plan.write_record(children)


async def supervise(plan: Plan) -> int:
    """One server's life, inside the loop it runs in. Raises NodeError."""
    return await Supervisor(plan).run()
