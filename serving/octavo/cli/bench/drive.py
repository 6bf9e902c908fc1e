"""Sends requests to a server when they are due and notes what comes back. One event loop, no threads.

Open loop with a rate (a request is sent when its time comes, however slow the server is, unless `limit` holds it back),
closed loop without (`limit` requests at all times).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.cli.bench.client import Cut, Http, Unreachable
from octavo.cli.bench.dialects import Dialect, what_it_said
from octavo.cli.bench.figures import Outcome
from octavo.cli.bench.work import Item

OnDone = Callable[[Outcome], None]


@dataclass(frozen=True)
class Plan:
    """What a run sends. `due` is in seconds from its start."""

    items: Sequence[Item]
    due: Sequence[float]
    limit: int | None  # most requests at once
    timeout: float  # seconds of one request


@dataclass
class Run:
    """The outcomes of those that have ended, and when it all began."""

    began: float
    outcomes: list[Outcome]
    cpu_seconds: float | None = None


async def drive(http: Http, dialect: Dialect, plan: Plan, run: Run, on_done: OnDone) -> None:
    """Send everything and wait for all answers. `run` has what has ended also when this is cancelled."""
    bodies = [dialect.body(item) for item in plan.items]  # made before the clock starts
    gate = asyncio.Semaphore(plan.limit) if plan.limit else None
    cpu, run.began = time.process_time(), time.monotonic()
    waiting: set[asyncio.Task[None]] = set()

    async def one(outcome: Outcome, body: bytes) -> None:
        try:
            await ask(http, dialect, body, outcome, timeout=plan.timeout)
        finally:
            if gate is not None:
                gate.release()
        run.outcomes.append(outcome)
        on_done(outcome)

    try:
        for index, (item, body) in enumerate(zip(plan.items, bodies)):
            due = run.began + plan.due[index]
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            if gate is not None:
                await gate.acquire()
            outcome = Outcome(index, due=due, input_tokens=planned_tokens(item))
            task = asyncio.create_task(one(outcome, body))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)
    finally:
        run.cpu_seconds = time.process_time() - cpu
        for task in waiting:
            task.cancel()


async def ask(http: Http, dialect: Dialect, body: bytes, outcome: Outcome, *, timeout: float) -> None:
    """One request to its end; every failure is noted in `outcome`."""
    reader = dialect.reader(outcome)
    outcome.sent = time.monotonic()
    try:
        answer = await asyncio.wait_for(http.post(dialect.path, body, reader.line), timeout)
    except Unreachable as error:
        outcome.fail("cannot connect", str(error), now=time.monotonic())
    except Cut as error:
        outcome.fail("connection lost", str(error), now=time.monotonic())
    except asyncio.TimeoutError:
        outcome.fail("timeout", f"no end within {timeout:g} s", now=time.monotonic())
    else:
        now = time.monotonic()
        if outcome.error is not None:
            return
        if answer.status != 200:
            outcome.fail(f"HTTP {answer.status}", what_it_said(answer.body), now=now)
        elif not reader.complete:
            outcome.fail("cut short", "the stream ended without its last message", now=now)
        elif not outcome.arrivals:
            outcome.fail("no tokens", "the answer is empty", now=now)
        else:
            outcome.ended = now


def planned_tokens(item: Item) -> int:
    """Prompt tokens where they are known, else words; the server's own count replaces it."""
    if item.token_ids is not None:
        return len(item.token_ids)
    if item.text is not None:
        return len(item.text.split())
    return sum(len(message["content"].split()) for message in item.messages or ())
