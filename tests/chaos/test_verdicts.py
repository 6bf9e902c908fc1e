"""Small decisions behind the recovery: who hangs, what is a loop, when a client tries again."""

from __future__ import annotations

import asyncio
import os

import pytest

from octavo.node.deaths import Deaths
from octavo.node.health import Observed, Process, judge
from octavo.node.watch import BEAT_SILENCE_SECONDS, Beat, engine_trouble
from octavo.protocol.errors import Conflict, Unavailable
from octavo_client import Options
from octavo_client.stream_state import StreamState

NOW = 1000.0


def seen(*, heard: float, attached: float = 900.0, deadline: float = 0.0, info_at: float = NOW - 0.2) -> Observed:
    times = {"heard_at": heard, "attached_at": attached}
    info = {"state": "ready", "engine_times": times, "engine": {"step_deadline": deadline}}
    return Observed(info=info, info_at=info_at, front_end_at=850.0)


@pytest.mark.parametrize(
    ("observed", "hangs"),
    [
        (seen(heard=NOW - 1), False),
        (seen(heard=NOW - 5), True),
        (seen(heard=NOW - 5, deadline=NOW + 3), False),  # its step may take that long
        (seen(heard=NOW - 12, deadline=NOW - 2), True),
        (seen(heard=NOW - 5, info_at=NOW - 2), False),  # nobody can tell
        (seen(heard=NOW - 50, attached=700.0), False),  # the one of before: this one loads
        (seen(heard=400.0, attached=400.0), False),
    ],
)
def test_an_engine_hangs_if_it_is_silent_past_its_steps_deadline(observed: Observed, hangs: bool) -> None:
    assert bool(engine_trouble(observed, started=800.0, now=NOW)) == hangs


def test_a_load_may_be_silent_for_long_but_not_for_ever() -> None:
    quiet = seen(heard=1.0, attached=0.0)
    assert engine_trouble(quiet, started=NOW - 290, now=NOW) == ""
    quiet.front_end_at = 0.0
    assert "silent" in engine_trouble(quiet, started=NOW - 310, now=NOW)


def test_five_deaths_in_a_minute_are_enough() -> None:
    deaths = Deaths()
    assert [deaths.record(float(now), limit=5) for now in range(4)] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert deaths.record(50.0, limit=5) is None


def test_deaths_long_ago_or_before_a_served_request_do_not_count() -> None:
    deaths = Deaths()
    for now in range(4):
        deaths.record(float(now), limit=5)
    assert deaths.record(100.0, limit=5) == pytest.approx(0.1)
    for now in (101.0, 102.0, 103.0):
        deaths.record(now, limit=5)
    assert deaths.record(105.0, limit=5, served_at=104.0) == pytest.approx(0.1)
    assert deaths.total == 9


def test_a_worker_that_stops_beating_is_noticed() -> None:
    now = [0.0]

    async def scenario() -> tuple[str, str, str]:
        beat = Beat(clock=lambda: now[0])
        child = os.dup(beat.write)
        beat.listen()
        before = beat.trouble()
        os.write(child, b".")
        await asyncio.sleep(0.05)
        now[0] = BEAT_SILENCE_SECONDS - 0.1
        alive = beat.trouble()
        now[0] = BEAT_SILENCE_SECONDS + 0.1
        silent = beat.trouble()
        os.close(child)
        beat.close()
        return before, alive, silent

    before, alive, silent = asyncio.run(scenario())
    assert (before, alive) == ("", "")
    assert silent.startswith("has not moved for")


def test_a_worker_that_does_not_reach_the_model_server_is_not_ready() -> None:
    """What it says counts if it was said after Triton's start; who says nothing is believed."""
    now = [10.0]

    async def scenario() -> list[bool]:
        beat = Beat(clock=lambda: now[0])
        child = os.dup(beat.write)
        beat.listen()
        seen = [beat.reaches(since=5.0)]
        for words, since in ((b".", 5.0), (b"+", 5.0), (b"", 11.0), (b".-", 5.0), (b".+.", 5.0)):
            os.write(child, words) if words else None
            await asyncio.sleep(0.05)
            seen.append(beat.reaches(since=since))
        os.close(child)
        beat.close()
        return seen

    assert asyncio.run(scenario()) == [True, True, True, False, False, True]


def test_what_a_worker_served_is_known_even_if_the_front_end_died_unasked() -> None:
    async def scenario() -> list[int]:
        served: list[str] = []
        beat = Beat(clock=lambda: NOW, on_served=lambda: served.append("once"))
        child = os.dup(beat.write)
        beat.listen()
        counts = []
        for words in (b".", b".*", b"+", b"**"):
            os.write(child, words)
            await asyncio.sleep(0.05)
            counts.append(len(served))
        os.close(child)
        beat.close()
        return counts

    assert asyncio.run(scenario()) == [0, 1, 1, 2]


def test_readiness_waits_for_every_worker_that_serves() -> None:
    engine, triton = Process("engine", "running", 1, 0, 9.0), Process("triton", "running", 2, 0, 9.0)
    observed = seen(heard=NOW)
    observed.info_from = observed.token_for = (1, 2)
    observed.gateway_at = NOW
    for reaches in (True, False):
        worker = Process("gateway-1", "running", 3, 0, 9.0, reaches=reaches)
        verdict = judge(observed, [engine, triton, worker], gateway=True, now=NOW)
        assert (verdict.state == "ready") is reaches
        assert reaches or "gateway-1 does not reach the model server" in verdict.reason


def test_giving_up_is_the_first_reason() -> None:
    process = Process("engine", "dead", None, 5, 0.0)
    verdict = judge(Observed(failed="engine died 5 times", draining=True), [process], gateway=True, now=NOW)
    assert (verdict.state, verdict.reason) == ("down", "giving up: engine died 5 times")


def test_a_client_outlives_its_own_ghost_but_respects_a_strangers_request() -> None:
    def state() -> StreamState:
        return StreamState("x", Options(), req_id="r", clock=lambda: 0.0, patience=30.0)

    with pytest.raises(Conflict):
        state().lost(Conflict("r is in flight"))
    resumed = state()
    resumed.lost(Unavailable("gone"))
    assert resumed.lost(Conflict("r is in flight")) > 0
    assert resumed.request()["attempt"] == 2
