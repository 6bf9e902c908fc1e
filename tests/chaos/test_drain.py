"""SIGTERM and stop_server.sh: what was accepted ends, what comes is refused, nothing stays."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import httpx
import pytest

from chaos.conftest import Foreground, start
from chaos.scoreboard import Row
from chaos.streams import Crowd
from chaos.test_slow_readers import ask_and_never_read, check_complete, read_on
from chaos.victims import alive, descendants_of, wait_until
from server.conftest import make_server

pytestmark = pytest.mark.server

STREAMS = 12  # four run, eight wait
TOKENS = 1500


def new_request(url: str) -> httpx.Response | None:
    try:
        return httpx.post(f"{url}/v1/chat/completions", json={"text": "x"}, timeout=5, trust_env=False)
    except httpx.HTTPError:
        return None


def test_stop_server_lets_everything_accepted_end(tmp_path: Path, row: Row) -> None:
    server = make_server(tmp_path, MAX_DEC_LEN="8000", BATCH_SIZE="4", DRAIN_SECONDS="60")
    victim = start(server)
    family = [victim.node, *descendants_of(victim.node)]
    row.faults = 1
    with Crowd(server.gateway, count=STREAMS, num_tokens=TOKENS) as crowd:
        wait_until(lambda: victim.health()["frontend"]["accepted"] >= STREAMS, seconds=20, what="all accepted")
        assert not all(stream.token_ids for stream in crowd.streams), "some still wait"
        results: list = []
        began = time.monotonic()
        stopper = threading.Thread(target=lambda: results.append(server.script("stop_server.sh")))
        stopper.start()
        wait_until(lambda: not victim.ready(), seconds=3, what="not ready")
        assert "draining" in victim.health()["reason"]
        refused = new_request(server.gateway)
        assert refused is not None
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert crowd.num_in_flight
        crowd.wait_end()
        stopper.join(60)
        row.recovery.append(time.monotonic() - began)
    row.streams = STREAMS
    row.lost = sum((stream.finish_reason, len(stream.token_ids)) != ("length", TOKENS) for stream in crowd.streams)
    assert results[0].returncode == 0, results[0].stdout
    assert not any(map(alive, family))
    row.leaks += victim.regions()
    row.check()


@pytest.mark.slow
def test_sigterm_ends_the_rest_with_a_clean_error(tmp_path: Path, row: Row) -> None:
    """Longer than DRAIN_SECONDS: running and waiting streams end with 503, and node with 0."""
    server = make_server(tmp_path, MAX_DEC_LEN="8000", BATCH_SIZE="4", DRAIN_SECONDS="2")
    with Foreground(server, "-m", "octavo.node") as house:
        family = descendants_of(house.victim.node)
        with Crowd(server.gateway, count=STREAMS, num_tokens=7900) as crowd:
            wait_until(lambda: house.victim.health()["frontend"]["accepted"] >= STREAMS, seconds=20, what="accepted")
            house.process.terminate()
            row.faults, row.streams = 1, STREAMS
            began = time.monotonic()
            code = house.process.wait(30)
            row.recovery.append(time.monotonic() - began)
            crowd.wait_end(seconds=5)
        assert code == 0
        told = [stream.error for stream in crowd.streams]
        assert all(error == "503: the server is shutting down" or error.startswith("503: b") for error in told), told
        assert not any(map(alive, family))
        row.leaks += house.victim.regions()
        row.check()


@pytest.mark.slow
def test_a_drain_waits_for_slow_readers_and_not_for_ever(tmp_path: Path, row: Row) -> None:
    """All is generated; one reads on while the server drains and gets its whole answer, one never reads."""
    server = make_server(tmp_path, BATCH_SIZE="4", DRAIN_SECONDS="8")
    with contextlib.ExitStack() as opened, Foreground(server, "-m", "octavo.node") as house:
        family = descendants_of(house.victim.node)
        port = server.port("PUSH_MODE_HTTP_PORT")
        readers = [opened.enter_context(contextlib.closing(ask_and_never_read(port, at))) for at in range(2)]
        wait_until(lambda: house.victim.health()["frontend"]["unread"] == 2, seconds=60, what="all generated")
        house.process.terminate()
        row.faults, row.streams = 1, 2
        began = time.monotonic()
        wait_until(lambda: not house.victim.ready(), seconds=3, what="not ready")
        time.sleep(2)
        assert house.process.poll() is None, "it waits for its readers"
        check_complete(read_on(readers[0]))
        code = house.process.wait(30)
        row.recovery.append(time.monotonic() - began)
        assert code == 0
        assert 8 <= row.recovery[0] <= 25
        assert not any(map(alive, family))
        row.leaks += house.victim.regions()
        row.check()
