"""A real server that is fed what no client should send, and a well-behaved neighbour that must not notice."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from chaos.streams import Crowd
from server.conftest import Server, make_server

SLOW_CASES = int(os.environ.get("OCTAVO_FUZZ_CASES", "10500"))  # of the long form, over all tests that have one
STREAMS, TOKENS = 2, 60  # of the neighbour


class Neighbour:
    """Streams asked for again and again, in a thread; each must say what it said when nobody else was there."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._expected = self._ask()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.rounds = 0
        self.faults: list[str] = []

    def _ask(self) -> list[tuple[str, list[int], str]]:
        with Crowd(self._url, count=STREAMS, num_tokens=TOKENS) as crowd:
            crowd.wait_end(seconds=60)
        return [(stream.error, stream.token_ids, stream.text) for stream in crowd.streams]

    def _run(self) -> None:
        while not self._stop.is_set():
            heard = self._ask()
            self.faults += [f"{one[0] or 'other tokens'}" for one, known in zip(heard, self._expected) if one != known]
            self.rounds += 1

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Ask while the body runs; AssertionError if anything was lost."""
        assert not any(error for error, _, _ in self._expected), self._expected
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join(90)
        assert self.rounds
        assert self.faults == []


@pytest.fixture(scope="session")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model behind every door, with short answers."""
    server = make_server(tmp_path_factory.mktemp("fuzz"), BATCH_SIZE="48", MAX_DEC_LEN="64", MAX_SEQ_LEN="1024")
    started = server.script("start_server.sh")
    assert started.returncode == 0, started.stdout[-4000:] + started.stderr[-4000:]
    yield server
    stopped = server.script("stop_server.sh")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr


@pytest.fixture
def neighbour(fuzzed: Server) -> Iterator[Neighbour]:
    """Beside the test's own requests; what it says is judged at the end."""
    made = Neighbour(fuzzed.gateway)
    with made.beside():
        yield made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "fuzz" in item.path.parts and {"fuzzed", "neighbour"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)
