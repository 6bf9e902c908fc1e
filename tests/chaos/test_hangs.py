"""A hang is a death: what does not move in time is reported, killed and started again, and nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from chaos.conftest import Foreground, House
from chaos.prober import probing
from chaos.scoreboard import Row
from chaos.victims import Victim, wait_until
from server.conftest import make_server

pytestmark = pytest.mark.server

STOP_SECONDS = {"engine": 17.0, "stub": 15.0, "triton": 15.0, "gateway-1": 10.0}  # noticed, killed, ready again
STANDIN = Path(__file__).parent / "standin"


def reason_of(victim: Victim) -> str:
    body = victim.health()
    return "" if body["ready"] else body["reason"]


@pytest.mark.slow
def test_stop_gateway(house: House, row: Row) -> None:
    stop_and_wait(house, row, "gateway-1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["engine", "stub", "triton"])
def test_stop(house: House, row: Row, name: str) -> None:
    stop_and_wait(house, row, name)


def stop_and_wait(house: House, row: Row, name: str) -> None:
    """SIGSTOP: readiness tells within two seconds, then it is killed, and all goes on."""
    gateway = name.startswith("gateway")
    with house.ordeal(row, late_seconds=STOP_SECONDS[name] + 5, through_client=gateway, cuts=gateway) as crowd:
        old = house.victim.signal(name, signal.SIGSTOP)
        row.faults += 1
        began = time.monotonic()
        wait_until(lambda: reason_of(house.victim), seconds=2.5, what=f"a reason for the stopped {name}")
        house.victim.recover(name, old, seconds=30)
        row.recovery.append(time.monotonic() - began)
        crowd.wait_tokens(50) if crowd.num_in_flight else None
    assert row.recovery[0] <= STOP_SECONDS[name]
    process = "triton" if name == "stub" else name
    (shown,) = [one for one in house.victim.health()["processes"] if one["name"] == process]
    assert shown["last_end"].startswith("killed: it has"), shown


@pytest.mark.slow
def test_a_step_that_never_ends(tmp_path: Path, row: Row) -> None:
    """No signal stops it: the engine itself hangs in a step. The next engine takes that step."""
    server = make_server(tmp_path, MAX_DEC_LEN="8000")
    with Foreground(server, str(STANDIN / "node.py")) as house:
        url = f"{server.gateway}/v1/chat/completions"
        for _ in range(4):  # so that the engine knows how long steps take
            httpx.post(url, json={"text": "hello, llm", "max_dec_len": 16, "ignore_eos": True}, timeout=30)
        old = house.victim.pid("engine")
        answers: list[httpx.Response] = []
        body = {"input_ids": [4001] * 8, "max_dec_len": 4, "min_dec_len": 4}
        sender = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=60)))
        with probing(server, row):
            sender.start()
            row.faults = 1
            began = time.monotonic()
            wait_until(lambda: house.victim.pid("engine") not in (None, old), seconds=20, what="another engine")
            row.recovery.append(time.monotonic() - began)
            (shown,) = [one for one in house.victim.health()["processes"] if one["name"] == "engine"]
            assert "past its step's deadline" in shown["last_end"]
            sender.join(60)
        row.check()
        assert (answers[0].status_code, answers[0].json()["tokens_all_num"]) == (200, 4)
