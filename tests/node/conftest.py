"""A server with stand-ins for engine, gateway and front end, and the real node and Triton."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from node.server_process import ServerProcess


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path)
    yield process
    process.end()


@pytest.fixture
def started(server: ServerProcess) -> ServerProcess:
    """The same, ready."""
    done = server.start()
    assert done.returncode == 0, done.stdout + done.stderr
    return server
