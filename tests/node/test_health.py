"""The verdict on what was observed, and polling with upstreams that answer, fail or hang."""

from __future__ import annotations

import asyncio
import time

from node.server_process import free_ports
from octavo.node.health import Monitor, Observed, Process, judge
from octavo.protocol.errors import QueueFull, Unavailable

NOW = 100.0
PROCESSES = [Process(name, "running", pid, 0, 5.0) for name, pid in (("engine", 1), ("triton", 2), ("gateway-1", 3))]
SOURCE = (1, 2)


def observed(**changes: object) -> Observed:
    """A server that is well at NOW, but for the changes."""
    info = {"state": "ready", "engine_age": 0.1, "engine": {"step_deadline": 0.0}}
    well = {"info": info, "info_at": NOW - 0.2, "info_from": SOURCE, "gateway_at": NOW - 0.2, "token_for": SOURCE}
    return Observed(**{**well, **changes})


def verdict(seen: Observed, processes: list[Process] = PROCESSES, *, gateway: bool = True) -> tuple[str, str]:
    found = judge(seen, processes, gateway=gateway, now=NOW)
    return found.state, found.reason


def test_ready_when_every_stage_is_well() -> None:
    assert verdict(observed()) == ("ready", "")


def test_starting_before_the_first_answer_and_down_after_a_first_ready() -> None:
    nothing = {"info": {}, "info_at": 0.0, "info_from": ()}
    assert verdict(observed(**nothing))[0] == "starting"
    assert verdict(observed(**nothing, ever_ready=True))[0] == "down"


def test_an_answer_older_than_one_and_a_half_seconds_does_not_count() -> None:
    state, reason = verdict(observed(info_at=NOW - 1.6, info_error="Triton: unavailable", ever_ready=True))
    assert state == "down"
    assert reason == "the front end has not answered for 1.6 s (Triton: unavailable)"


def test_an_answer_of_a_triton_that_is_gone_does_not_count() -> None:
    assert verdict(observed(info_from=(1, 77)))[0] != "ready"


def test_a_token_of_an_engine_that_is_gone_does_not_count() -> None:
    assert verdict(observed(token_for=(77, 2)))[1].startswith("waiting for a first token")


def test_loading_tells_stage_and_percent() -> None:
    info = {"state": "loading", "progress": {"stage": "weights", "fraction": 0.434}}
    assert verdict(observed(info=info)) == ("loading", "loading weights 43 %")


def test_a_front_end_that_will_never_serve_is_down_before_the_first_ready() -> None:
    info = {"state": "down", "reason": "no tokenizer.json", "frontend": {"failure": None}}
    assert verdict(observed(info=info)) == ("starting", "no tokenizer.json")
    info["frontend"] = {"failure": "no tokenizer.json"}
    assert verdict(observed(info=info)) == ("down", "no tokenizer.json")


def test_engine_without_a_sign_of_life_is_down_unless_its_step_may_still_run() -> None:
    quiet = {"state": "ready", "engine_age": 4.0, "engine": {"step_deadline": 0.0}}
    assert verdict(observed(info=quiet)) == ("down", "the engine has made no progress for 4.2 s")
    long_step = {"state": "ready", "engine_age": 4.0, "engine": {"step_deadline": NOW + 1}}
    assert verdict(observed(info=long_step))[0] == "ready"
    overdue = {"state": "ready", "engine_age": 4.0, "engine": {"step_deadline": NOW - 1}}
    assert verdict(observed(info=overdue))[0] == "down"


def test_dead_process_is_named() -> None:
    dead = [*PROCESSES[:2], Process("gateway-1", "dead", None, 1, 0.0)]
    assert verdict(observed(ever_ready=True), dead) == ("down", "gateway-1 is down; it is being restarted")


def test_stopped_process_is_named_whatever_its_last_answer() -> None:
    stopped = [Process("engine", "stopped", 1, 0, 5.0), *PROCESSES[1:]]
    assert verdict(observed(ever_ready=True), stopped) == ("down", "engine is stopped by a signal")


def test_gateway_that_does_not_answer_is_not_ready_but_without_one_it_does_not_matter() -> None:
    assert "gateway" in verdict(observed(gateway_at=NOW - 3))[1]
    assert verdict(observed(gateway_at=0.0), PROCESSES[:2], gateway=False)[0] == "ready"


def test_draining_comes_before_everything() -> None:
    assert verdict(observed(draining=True, info={}))[0] == "draining"


class ScriptedUpstream:
    """Answers `info` as ready; what a generation does is up to the test."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.tokens = 0

    async def ask(self, body: dict[str, object], *, seconds: float) -> dict[str, object]:
        if body.get("op") == "info":
            return {"state": "ready", "engine_age": 0.0}
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome
        self.tokens += 1
        return {"token": "a"}


async def run_monitor(upstream: ScriptedUpstream, *, until: str, gateway: tuple[str, int] | None = None) -> Monitor:
    """Poll until the state is reached, at most three seconds."""
    processes = PROCESSES[:2]
    monitor = Monitor(upstream, gateway=gateway, processes=lambda: processes, clock=time.monotonic)
    tasks = [asyncio.create_task(work) for work in monitor.work()]
    deadline = time.monotonic() + 3
    while monitor.verdict().state != until and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return monitor


async def test_ready_takes_one_real_token() -> None:
    upstream = ScriptedUpstream()
    monitor = await run_monitor(upstream, until="ready")
    assert monitor.verdict().state == "ready"
    assert upstream.tokens == 1


async def test_failed_token_is_tried_again() -> None:
    upstream = ScriptedUpstream(Unavailable("not yet"), Unavailable("not yet"))
    monitor = await run_monitor(upstream, until="ready")
    assert monitor.verdict().state == "ready"
    assert (upstream.tokens, upstream.outcomes) == (1, [])


async def test_full_queue_is_an_answer() -> None:
    monitor = await run_monitor(ScriptedUpstream(QueueFull("full")), until="ready")
    assert monitor.verdict().state == "ready"


async def test_gateway_port_that_refuses_is_never_ready() -> None:
    [port] = free_ports(1)
    monitor = await run_monitor(ScriptedUpstream(), until="never", gateway=("127.0.0.1", port))
    assert "ConnectionRefusedError" in monitor.verdict().reason
