"""The short form for every run of the tests: one death of each process with streams in flight, and one drain.

Bounds are those of a busy machine of two cores; the tight ones are in the long form.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chaos.conftest import start
from chaos.prober import Prober
from chaos.scoreboard import Row
from chaos.streams import Crowd, Stream
from chaos.victims import alive, descendants_of, wait_until
from server.conftest import make_server

pytestmark = pytest.mark.server

STREAMS = 12
TOKENS = 600
RECOVERY_SECONDS = 30.0
LATE_SECONDS = 45.0


def reference(url: str) -> list[Stream]:
    with Crowd(url, count=STREAMS, num_tokens=TOKENS) as crowd:
        crowd.wait_end()
    assert not any(stream.error for stream in crowd.streams)
    return crowd.streams


def test_every_process_dies_once_and_nothing_is_lost(tmp_path: Path, row: Row) -> None:
    server = make_server(tmp_path, MAX_DEC_LEN="8000", DRAIN_SECONDS="20")
    victim = start(server)
    family = [victim.node, *descendants_of(victim.node)]
    try:
        undisturbed = reference(server.gateway)
        before = victim.footprint()
        for name in ("engine", "stub", "triton", "gateway-1"):
            gateway = name == "gateway-1"
            with (
                Prober(server) as prober,
                Crowd(server.gateway, count=STREAMS, num_tokens=TOKENS, through_client=gateway) as crowd,
            ):
                crowd.wait_all_started()
                old = victim.signal(name)
                row.faults += 1
                row.recovery.append(victim.recover(name, old, seconds=RECOVERY_SECONDS))
                crowd.wait_end()
            crowd.judge(row, undisturbed, late_seconds=LATE_SECONDS)
            row.probes += prober.num_sent
            row.lies += len(prober.lies) + (0 if gateway else len(prober.cut))
            victim.wait_idle(seconds=20)
            family = sorted({*family, *descendants_of(victim.node)})
        wait_until(lambda: not victim.leaks(before), seconds=10, what="no leak", why=lambda: str(victim.leaks(before)))
        row.check()
    finally:
        victim.close()
        began = time.monotonic()
        stopped = server.script("stop_server.sh")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert time.monotonic() - began < 20
    assert not any(map(alive, family))
    assert victim.regions() == []
