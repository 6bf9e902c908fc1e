"""The page on METRICS_PORT: Triton's nv_*, the front end's registry and node's own numbers. Node's event loop.

A part that does not answer is left out, so the page works while the server loads and while half of it is down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, generate_latest

from octavo import __version__
from octavo.node.health import STATES, Monitor, Process, Upstream, load_progress
from octavo.node.pages import Handler, Page, get
from octavo.node.ports import LOOPBACK
from octavo.protocol.errors import OctavoError

PART_SECONDS = 1.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NodeMetrics:
    """Node's own numbers in a registry of their own."""

    def __init__(self, *, model: str, max_waiting: int) -> None:
        self.registry = CollectorRegistry()
        limit = Gauge(
            "octavo_requests_waiting_limit",
            "Waiting requests beyond which others are refused (429)",
            registry=self.registry,
        )
        limit.set(max_waiting)
        self._state = Gauge("octavo_state", "1 for the state the server is in", ["state"], registry=self.registry)
        self._progress = Gauge("octavo_load_progress", "Loaded share of the model, 0 to 1", registry=self.registry)
        self._up = Gauge("octavo_process_up", "1 if the process runs", ["process"], registry=self.registry)
        self.restarts = Counter("octavo_restarts", "Restarts of a process by node", ["process"], registry=self.registry)
        Info("octavo_build", "Version and served model", registry=self.registry).info(
            {"version": __version__, "model": model}
        )

    def page(self, monitor: Monitor, processes: list[Process]) -> str:
        """The lines of node's own numbers."""
        verdict = monitor.verdict()
        for state in STATES:
            self._state.labels(state).set(state == verdict.state)
        self._progress.set(1.0 if verdict.state == "ready" else load_progress(monitor.seen.info)[1])
        for process in processes:
            self._up.labels(process.name).set(process.state == "running")
            self.restarts.labels(process.name)
        return generate_latest(self.registry).decode()


def metrics_pages(
    metrics: NodeMetrics,
    *,
    monitor: Monitor,
    upstream: Upstream,
    triton_port: Callable[[], int | None],
    processes: Callable[[], list[Process]],
) -> dict[str, Handler]:
    """Paths of METRICS_PORT."""

    async def page() -> Page:
        parts = await asyncio.gather(_triton_part(triton_port()), _front_end_part(upstream))
        return Page(metrics.page(monitor, processes()) + "".join(parts), content_type=CONTENT_TYPE)

    return {"/metrics": page}


async def _triton_part(port: int | None) -> str:
    if port is None:
        return ""
    try:
        status, body = await get(LOOPBACK, port, "/metrics", seconds=PART_SECONDS)
    except (OSError, asyncio.TimeoutError):
        return ""
    return _ended(body) if status == 200 else ""


async def _front_end_part(upstream: Upstream) -> str:
    try:
        return _ended(str((await upstream.ask({"op": "metrics"}, seconds=PART_SECONDS)).get("text") or ""))
    except OctavoError:
        return ""


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"
