"""A real server that every quick case kills something of, the undisturbed answers, and the scoreboard at the end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
import pytest

from chaos.prober import probing
from chaos.scoreboard import Row, Scoreboard
from chaos.streams import Crowd, Stream
from chaos.victims import Footprint, Victim, wait_until
from server.conftest import REPOSITORY, Server, make_server

STREAMS = 32
RUN_SECONDS = 4.0  # of an undisturbed crowd
TRIAL_TOKENS = 500  # of each stream, to learn how fast this machine is
BOARD = pytest.StashKey[Scoreboard]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BOARD] = Scoreboard()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    board = config.stash.get(BOARD, None)
    if board is not None and board.rows:
        terminalreporter.section("chaos scoreboard")
        terminalreporter.line(board.text())


def start(server: Server) -> Victim:
    """Start it; AssertionError with what it said if it does not."""
    started = server.script("start_server.sh")
    assert started.returncode == 0, started.stdout[-4000:] + started.stderr[-4000:]
    return Victim(server)


class Foreground:
    """A server whose node is a child of this process, so that its exit code can be seen."""

    def __init__(self, server: Server, *command: str) -> None:
        environ = {**server.environ, "PYTHONPATH": f"{REPOSITORY}/serving:{REPOSITORY}/client"}
        self.log = server.run_dir / "foreground.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, *command], env=environ, stdout=log, stderr=log)
        self.server = server

    def __enter__(self) -> Foreground:
        wait_until(self._ready, seconds=30, what="ready")
        self.victim = Victim(self.server)
        return self

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.server.health}/v2/health/ready", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def __exit__(self, *exception: object) -> None:
        self.victim.close()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(10)
        self.server.script("stop_server.sh")


@dataclass
class House:
    """The server of the quick cases and how fast it is."""

    victim: Victim
    num_tokens: int  # of a stream, so that a crowd takes about RUN_SECONDS
    reference: list[Stream]
    footprint: Footprint  # before any fault

    def crowd(self, *, through_client: bool = False) -> Crowd:
        url = self.victim.server.gateway
        return Crowd(url, count=STREAMS, num_tokens=self.num_tokens, through_client=through_client)

    @contextmanager
    def ordeal(self, row: Row, *, late_seconds: float, through_client: bool = False, cuts: bool = False
               ) -> Iterator[Crowd]:
        """A crowd and a prober; the body brings the faults. Then everything must have ended as if nothing had been.

        `cuts`: gateways die, so a connection may break.
        """
        with (
            probing(self.victim.server, row, cuts=cuts),
            self.crowd(through_client=through_client) as crowd,
        ):
            crowd.wait_all_started()
            yield crowd
            crowd.wait_end()
        crowd.judge(row, self.reference, late_seconds=late_seconds)
        self.victim.wait_idle()
        row.leaks += self.victim.leaks(self.footprint)
        row.check()


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Two gateway workers, the demo model, and what 32 streams say when nothing happens."""
    server = make_server(tmp_path_factory.mktemp("chaos"), BATCH_SIZE="48", MAX_DEC_LEN="8000",
                         PUSH_MODE_HTTP_WORKERS="2", DRAIN_SECONDS="10")
    victim = start(server)
    try:
        with Crowd(server.gateway, count=STREAMS, num_tokens=TRIAL_TOKENS) as trial:
            trial.wait_end()
        seconds = max(stream.heard_at for stream in trial.streams) - trial.began
        num_tokens = min(7900, max(TRIAL_TOKENS, int(TRIAL_TOKENS * RUN_SECONDS / seconds)))
        with Crowd(server.gateway, count=STREAMS, num_tokens=num_tokens) as undisturbed:
            undisturbed.wait_end()
        assert not any(stream.error for stream in undisturbed.streams)
        victim.wait_idle()
        yield House(victim, num_tokens, undisturbed.streams, victim.footprint())
        victim.close()
    finally:
        stopped = server.script("stop_server.sh")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert victim.regions() == []


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """This case's line of the scoreboard."""
    return request.config.stash[BOARD].row(request.node.name.removeprefix("test_").replace("_", " "))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases with a server kill processes under tight bounds: of the long form, for an otherwise idle machine. The
    quick one and the soak are made for any machine.
    """
    for item in items:
        long = "chaos" in item.path.parts and item.path.name not in ("test_quick.py", "test_soak.py")
        if long and item.get_closest_marker("server"):
            item.add_marker(pytest.mark.slow)
