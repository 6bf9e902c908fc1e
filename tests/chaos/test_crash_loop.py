"""Deaths without end: a request that kills is found and ended alone; a server that cannot live says why and exits."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest

from chaos.conftest import Foreground
from chaos.prober import probing
from chaos.scoreboard import Row
from chaos.streams import Crowd
from chaos.victims import alive, descendants_of
from server.conftest import make_server

pytestmark = [pytest.mark.server, pytest.mark.slow]

STANDIN = Path(__file__).parent / "standin"
STREAMS, TOKENS = 8, 400


def test_a_poison_is_ended_and_the_others_go_on(tmp_path: Path, row: Row) -> None:
    server = make_server(tmp_path, MAX_DEC_LEN="8000")
    with Foreground(server, str(STANDIN / "node.py")) as house:
        with Crowd(server.gateway, count=STREAMS, num_tokens=TOKENS) as undisturbed:
            undisturbed.wait_end()
        with probing(server, row), Crowd(server.gateway, count=STREAMS, num_tokens=TOKENS) as crowd:
            crowd.wait_all_started()
            body = {"input_ids": [4000] * 8, "max_dec_len": 4}
            answer = httpx.post(f"{server.gateway}/v1/chat/completions", json=body, timeout=90)
            crowd.wait_end()
        engine = next(one for one in house.victim.health()["processes"] if one["name"] == "engine")
        row.faults = engine["restarts"]
        assert row.faults == 3
        assert answer.status_code == 500
        assert "the engine failed again and again on this request" in answer.text
        crowd.judge(row, undisturbed.streams, late_seconds=30)
        house.victim.wait_ready(seconds=10)
        row.check()


def test_a_crash_loop_ends_with_the_reason(tmp_path: Path, row: Row) -> None:
    """Five deaths of the engine and no request that ended in between; so no probe either."""
    server = make_server(tmp_path, MAX_DEC_LEN="8000", BATCH_SIZE="4")
    with Foreground(server, "-m", "octavo.node") as house:
        family = descendants_of(house.victim.node)
        reasons: set[str] = set()
        refusals: set[str] = set()
        watcher = threading.Thread(target=watch, args=(house, reasons, refusals), daemon=True)
        with Crowd(server.gateway, count=4, num_tokens=7900) as crowd:
            crowd.wait_all_started()
            watcher.start()
            for _ in range(4):
                old = house.victim.signal("engine")
                house.victim.wait_reborn("engine", old, seconds=15)
            house.victim.signal("engine")
            row.faults = 5
            began = time.monotonic()
            code = house.process.wait(30)
            row.recovery.append(time.monotonic() - began)
            crowd.wait_end(seconds=10)
        watcher.join(10)
        assert code == 1
        assert any("giving up: engine died 5 times" in reason for reason in reasons), reasons
        assert any("503" in refusal and "engine died 5 times" in refusal for refusal in refusals), refusals
        assert all(stream.error.startswith("503: the server gives up: engine died 5 times") for stream in crowd.streams)
        assert not any(map(alive, family))
        row.leaks += house.victim.regions()
        row.check()
        assert "octavo: error: engine died 5 times in a row" in house.log.read_text()


def watch(house: Foreground, reasons: set[str], refusals: set[str]) -> None:
    """What readiness and a new request are told until nobody is there."""
    server = house.server
    while house.process.poll() is None:
        try:
            reasons.add(httpx.get(f"{server.health}/v2/health/ready", timeout=2).text)
            if "giving up" in "".join(reasons):
                answer = httpx.post(f"{server.gateway}/v1/chat/completions", json={"text": "x"}, timeout=5)
                refusals.add(f"{answer.status_code} {answer.text}")
        except httpx.HTTPError:
            pass
        time.sleep(0.05)


def test_deaths_with_requests_served_between_them_are_no_loop(tmp_path: Path, row: Row) -> None:
    server = make_server(tmp_path, MAX_DEC_LEN="8000")
    with Foreground(server, "-m", "octavo.node") as house, probing(server, row):
        for _ in range(7):
            old = house.victim.signal("engine")
            row.faults += 1
            row.recovery.append(house.victim.recover("engine", old, seconds=20))
            house.victim.serve_one()
        assert house.process.poll() is None
    row.check()
