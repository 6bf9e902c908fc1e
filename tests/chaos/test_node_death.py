"""kill -9 of node: everything that it started ends by itself, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.conftest import start
from chaos.scoreboard import Row
from chaos.streams import Crowd
from chaos.victims import alive, descendants_of, wait_until
from server.conftest import make_server

pytestmark = pytest.mark.server

END_SECONDS = 6.0


@pytest.mark.parametrize("busy", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_kill_node(tmp_path: Path, row: Row, *, busy: bool) -> None:
    server = make_server(tmp_path, MAX_DEC_LEN="8000")
    victim = start(server)
    family = descendants_of(victim.node)
    assert len(family) >= 4
    assert victim.regions()
    with Crowd(server.gateway, count=8 if busy else 0, num_tokens=7900) as crowd:
        crowd.wait_all_started()
        victim.signal("node")
        row.faults = 1
        row.recovery.append(wait_until(lambda: not any(map(alive, family)), seconds=30, what="the end of all"))
        crowd.wait_end(seconds=10)
    row.leaks += victim.regions()
    assert row.recovery[0] <= END_SECONDS
    row.check()
    again = server.script("stop_server.sh")
    assert again.returncode == 0, again.stdout + again.stderr
    assert not (tmp_path / "node.pid").exists()
